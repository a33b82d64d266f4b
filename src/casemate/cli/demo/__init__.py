"""``casemate demo``: two hospitals and a startup, each in a process of its own, on one machine.

``command`` starts it, ``story`` tells it, ``cast`` holds the processes and ``party`` runs in
each; ``table`` is the data and how it is shared out; ``show`` and ``chart`` draw.

``model.py.txt`` is the startup's own PyTorch file, which the demo copies into the startup's home:
casemate itself has no torch outside the engine.
"""
