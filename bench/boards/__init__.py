"""What is made of results: boards, the regression check, RobustBench's JSON. Imports no torch."""
