"""Results as figures and as one static page. Imports no torch."""
