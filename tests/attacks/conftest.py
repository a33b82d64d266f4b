from support.parties import folder, owner, scientist, server

__all__ = ["folder", "owner", "scientist", "server"]
