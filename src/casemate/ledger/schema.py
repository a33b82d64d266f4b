"""Tables of the sealed store. The log's entries are the truth; ``fsck`` replays them against the
other tables. What is compared is an integer; values are canonical JSON of shared formats."""

from __future__ import annotations

from typing import Final

VERSION: Final = 3
APPLICATION_ID: Final = 0x43534D54  # "CSMT"

# What version 3 added: deployed models and their sales. `accepted`: the measurement under which its
# owner lets one run. `calls`: of a caller in this epoch, with those of a block that is not used up.
# `sealed_key`: sealed to the buyer; NULL once the model is gone, the sale and its receipt stay.
MODELS: Final = """
CREATE TABLE models(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities, deployment BLOB NOT NULL,
  policy BLOB NOT NULL, policy_digest TEXT NOT NULL, serving BLOB NOT NULL,
  model_key BLOB NOT NULL, accepted TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE model_calls(
  model TEXT NOT NULL REFERENCES models, caller TEXT NOT NULL REFERENCES identities,
  calls INTEGER NOT NULL CHECK (calls > 0), PRIMARY KEY (model, caller)
) STRICT, WITHOUT ROWID;
CREATE TABLE sales(
  id TEXT PRIMARY KEY, model TEXT NOT NULL, seller TEXT NOT NULL REFERENCES identities,
  buyer TEXT NOT NULL REFERENCES identities, sale BLOB NOT NULL, salt BLOB NOT NULL,
  entry INTEGER NOT NULL UNIQUE REFERENCES entries, receipt TEXT NOT NULL, sealed_key BLOB
) STRICT, WITHOUT ROWID;
CREATE INDEX sales_of_model ON sales(model);
CREATE INDEX sales_of_seller ON sales(seller);
CREATE INDEX sales_of_buyer ON sales(buyer);
"""

# A dataset's key stands in a table of its own, so that revoking is deleting a row. `nodes`: the
# complete subtrees of the log's Merkle tree. An account without a scientist is the whole lineage's.
# `result_key` is a result's stream key until it is released, then what is sealed to the scientist.
# `granted`: the entry that lets `boot` run the job. `states`: a run's newest sealed state.
# A log key `ended` at the size at which a recovery went on under the next one. `frozen`: until its
# owner consents to a recovery (`accepted` is 'recovery'), or to the software that runs (`accepted`
# is the measurement before it, so that going back needs no consent).
SCHEMA: Final = (
    """
CREATE TABLE entries(sequence INTEGER PRIMARY KEY, entry BLOB NOT NULL) STRICT;
CREATE TABLE nodes(
  level INTEGER NOT NULL, place INTEGER NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (level, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE log_keys(
  generation INTEGER PRIMARY KEY, origin TEXT NOT NULL UNIQUE, key BLOB NOT NULL, ended INTEGER
) STRICT;
CREATE TABLE next_log_key(origin TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE anchor(
  one INTEGER PRIMARY KEY CHECK (one = 1), secret BLOB NOT NULL,
  name TEXT, count INTEGER, before BLOB, step BLOB
) STRICT;
CREATE TABLE cosignatures(
  witness TEXT PRIMARY KEY, size INTEGER NOT NULL, line TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE attestations(
  boot BLOB PRIMARY KEY, digest TEXT NOT NULL, attestation BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE identities(id TEXT PRIMARY KEY, identity BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE lineages(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities, filter TEXT NOT NULL,
  budget BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE accounts(
  lineage TEXT NOT NULL REFERENCES lineages, scientist TEXT NOT NULL,
  rdp_nano TEXT NOT NULL, delta_femto INTEGER NOT NULL CHECK (delta_femto >= 0),
  jobs INTEGER NOT NULL CHECK (jobs >= 0), PRIMARY KEY (lineage, scientist)
) STRICT, WITHOUT ROWID;
CREATE TABLE datasets(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities,
  lineage TEXT NOT NULL REFERENCES lineages, registration BLOB NOT NULL, policy BLOB NOT NULL,
  policy_digest TEXT NOT NULL, salt BLOB NOT NULL,
  epoch INTEGER NOT NULL CHECK (epoch >= 0),
  state TEXT NOT NULL CHECK (state IN ('checking', 'ready', 'refused', 'revoked')), error TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE dataset_keys(
  dataset TEXT PRIMARY KEY REFERENCES datasets, key BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE consents(
  dataset TEXT PRIMARY KEY REFERENCES datasets, measurement TEXT NOT NULL, envelope TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE frozen(
  dataset TEXT NOT NULL REFERENCES datasets, accepted TEXT NOT NULL, PRIMARY KEY (dataset, accepted)
) STRICT, WITHOUT ROWID;
CREATE TABLE handed_over(entry INTEGER PRIMARY KEY REFERENCES entries) STRICT;
CREATE TABLE uploads(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES identities,
  size INTEGER NOT NULL CHECK (size > 0), used_by TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE quotes(
  digest TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, job TEXT NOT NULL,
  scientist TEXT NOT NULL REFERENCES identities, quote BLOB NOT NULL, submission BLOB NOT NULL,
  model_key BLOB NOT NULL, salt BLOB NOT NULL, void TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE quote_datasets(
  quote TEXT NOT NULL REFERENCES quotes, dataset TEXT NOT NULL REFERENCES datasets,
  verdict TEXT CHECK (verdict IN ('approve', 'reject')), PRIMARY KEY (quote, dataset)
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs(
  id TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, request_digest TEXT NOT NULL,
  quote TEXT NOT NULL REFERENCES quotes, scientist TEXT NOT NULL REFERENCES identities,
  state TEXT NOT NULL CHECK (state IN
    ('queued', 'reserved', 'running', 'committed', 'done', 'failed', 'cancelled', 'abandoned')),
  boot BLOB, reserved INTEGER REFERENCES entries, granted INTEGER REFERENCES entries,
  takeovers INTEGER NOT NULL DEFAULT 0, ended INTEGER REFERENCES entries,
  error TEXT, message TEXT NOT NULL DEFAULT '',
  blob TEXT, result_digest TEXT, result_key BLOB, envelope TEXT, bundle BLOB
) STRICT, WITHOUT ROWID;
CREATE TABLE states(
  job TEXT PRIMARY KEY REFERENCES jobs, step INTEGER NOT NULL, path TEXT NOT NULL,
  key BLOB NOT NULL
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
    + MODELS
)
