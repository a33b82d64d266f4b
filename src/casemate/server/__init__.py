"""The server: one table of routes, permissions, the job queue and the workers' keeper.

It never imports the engine; rows and models are opened only in workers, which are processes of
their own (``python -m casemate.worker``).
"""
