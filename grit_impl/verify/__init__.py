"""The verification: what is claimed, the evidence for it, and pytest, which brings the two together.

`options.py` says what can be asked. `evidence/` makes run records, exports and evaluations, or finds them again; in
`claims/` they are judged. `plugin.py` turns judgements into outcomes of tests; `terminal.py` sums them up; `results.py`
keeps them in `store/` and has `report/` drawn. `commands.py` is the same from the command line.
"""
