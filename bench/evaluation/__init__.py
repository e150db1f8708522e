"""What is done with one subject: planned, attacked block by block, judged, probed, replayed."""
