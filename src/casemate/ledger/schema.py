"""Tables of the sealed store. The log's entries are the truth; ``fsck`` replays them against the
other tables. What is compared is an integer; values are canonical JSON of shared formats."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1
APPLICATION_ID: Final = 0x43534D54  # "CSMT"

# A dataset's key stands in a table of its own, so that revoking is deleting a row.
SCHEMA: Final = """
CREATE TABLE entries(
  sequence INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, entry BLOB NOT NULL
) STRICT;
CREATE TABLE identities(id TEXT PRIMARY KEY, identity BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE lineages(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities, filter TEXT NOT NULL,
  budget BLOB NOT NULL, delta_femto INTEGER NOT NULL CHECK (delta_femto >= 0),
  jobs INTEGER NOT NULL CHECK (jobs >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE spent(
  lineage TEXT NOT NULL REFERENCES lineages, place INTEGER NOT NULL,
  rdp_nano INTEGER NOT NULL CHECK (rdp_nano >= 0), PRIMARY KEY (lineage, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE datasets(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities,
  lineage TEXT NOT NULL REFERENCES lineages, registration BLOB NOT NULL, policy BLOB NOT NULL,
  policy_digest TEXT NOT NULL, epoch INTEGER NOT NULL CHECK (epoch >= 0),
  state TEXT NOT NULL CHECK (state IN ('checking', 'ready', 'refused', 'revoked')), error TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE dataset_keys(
  dataset TEXT PRIMARY KEY REFERENCES datasets, key BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE uploads(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities,
  size INTEGER NOT NULL CHECK (size > 0), used_by TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE quotes(
  digest TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, job TEXT NOT NULL,
  scientist TEXT NOT NULL REFERENCES identities, quote BLOB NOT NULL, submission BLOB NOT NULL,
  model_key BLOB NOT NULL, void TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE quote_datasets(
  quote TEXT NOT NULL REFERENCES quotes, dataset TEXT NOT NULL REFERENCES datasets,
  verdict TEXT CHECK (verdict IN ('approve', 'reject')), PRIMARY KEY (quote, dataset)
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs(
  id TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, request_digest TEXT NOT NULL,
  quote TEXT NOT NULL REFERENCES quotes, scientist TEXT NOT NULL REFERENCES identities,
  state TEXT NOT NULL CHECK (state IN
    ('queued', 'reserved', 'running', 'done', 'failed', 'cancelled', 'abandoned')),
  boot BLOB, reserved INTEGER REFERENCES entries, ended INTEGER REFERENCES entries,
  error TEXT, message TEXT NOT NULL DEFAULT '',
  blob TEXT, result_digest TEXT, bundle BLOB
) STRICT, WITHOUT ROWID;
CREATE TABLE job_datasets(
  job TEXT NOT NULL REFERENCES jobs, dataset TEXT NOT NULL REFERENCES datasets,
  lineage TEXT NOT NULL REFERENCES lineages, charge BLOB NOT NULL, PRIMARY KEY (job, dataset),
  UNIQUE (job, lineage)
) STRICT, WITHOUT ROWID;
CREATE INDEX datasets_of_owner ON datasets(owner);
CREATE INDEX quotes_of_dataset ON quote_datasets(dataset);
CREATE INDEX jobs_of_dataset ON job_datasets(dataset);
CREATE INDEX jobs_of_lineage ON job_datasets(lineage);
CREATE INDEX jobs_in_state ON jobs(state);
"""
