"""The owner's side of a dataset: any table to the wire form, on the owner's machine only.

The worker checks the wire form against the schema again, inside the enclave.
"""

from casemate.client.data.encode import Encoded, encode
from casemate.client.data.schema import Declaration, dump_schema, load_schema, template

__all__ = ["Declaration", "Encoded", "dump_schema", "encode", "load_schema", "template"]
