"""One setting for all properties: no deadlines, since a busy machine is no fault."""

from hypothesis import settings

settings.register_profile("casemate", deadline=None, print_blob=True)
settings.load_profile("casemate")
