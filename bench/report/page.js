"use strict";
for (const table of document.querySelectorAll("table.board")) {
  const heads = [...table.tHead.rows[0].cells];
  const sortBy = (at) => {
    const head = heads[at];
    const descending = head.ariaSort ? head.ariaSort === "ascending" : "high" in head.dataset;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    for (const body of table.tBodies) {
      // what is not known comes last, in either order
      const value = (row) => row.cells[at].dataset.sort ?? "";
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en") : x - y;
        return descending ? -order : order;
      });
      body.append(...rows);
    }
  };
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => sortBy(at)));
  for (const box of table.closest("section").querySelectorAll(`input[data-table="${table.id}"]`)) {
    box.addEventListener("change", () => {
      const at = heads.findIndex((head) => head.dataset.column === box.value);
      for (const row of table.rows) row.cells[at].classList.toggle("off", !box.checked);
    });
  }
}
const open = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", open);
open();
