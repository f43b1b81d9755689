"""What to expect: closed forms, step costs, simulation, and a twin that plays it in real time."""
