# %% [markdown]
# # A receipt on a chain
#
# A contest's organiser wants the winner's training to be checkable by a contract: that an enclave's
# log commits to *this* receipt, under a head that was posted where nobody can take it back. A small
# enclave trains, its log is posted to a file and to a chain, and the chain is asked about the
# receipt: first the true one, then others that are almost right.
#
# Everything runs in this process and one server beside it: the TEE is **simulated**, the chain is
# py-evm's. `python examples/anchored_receipt.py`, or the notebook of the same name.
#
# %% [markdown]
# ## The operator: a server
#
# %%
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import casemate as cm
from casemate.cli.demo.chain import Account, Chain, Reverted
from casemate.client import anchors, contract
from casemate.seal import checkpoint

folder = Path(tempfile.mkdtemp(prefix="casemate-anchored-"))
server = subprocess.Popen(
    [
        sys.executable,
        "-m",
        "casemate",
        "serve",
        "--dev",
        "--state",
        folder / "state",
        "--port",
        "0",
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
atexit.register(server.terminate)
while not (folder / "state" / "server.json").exists():
    assert server.poll() is None, "the server did not start"
    time.sleep(0.1)
place = json.loads((folder / "state" / "server.json").read_text())
print(f"SIMULATED TEE at {place['url']}: it protects nothing, and proves nothing to others")

# %% [markdown]
# ## The owner pushes, the scientist trains
#
# A made-up survey: 8 answers of each person, and in which of two groups they are.
#
# %%
rows = int(os.environ.get("CASEMATE_EXAMPLE_ROWS", 2000))
rule = np.random.default_rng(0).standard_normal(8)


def survey(people, seed):
    """Answers in [-4, 4], and groups by a rule that is the same for every seed."""
    answers = np.random.default_rng(seed).standard_normal((people, 8)).clip(-4, 4)
    return answers.astype(np.float32), (answers @ rule > 0).astype(np.int64)


answers, groups = survey(rows, seed=1)
columns = {f"answer {i}": answers[:, i] for i in range(8)}
trust = cm.Trust.simulated(place["root"])  # accepted only because it is asked for by name
memory = cm.Memory(folder / "seen")  # what is seen of the log
owner, scientist = (
    cm.connect(place["url"], trust=trust, identity=cm.Identity.generate(name), memory=memory)
    for name in ("owner", "scientist")
)
dataset = owner.datasets.push(
    {**columns, "group": groups},
    name="survey",
    label="group",
    classes=2,
    bounds=dict.fromkeys(columns, (-4, 4)),
    policy=cm.Policy([scientist.identity.id]),
    budget=cm.Budget(2.0, 1e-5),
)

# %% [markdown]
# ## The organiser posts the log as it is before the contest
#
# An anchor's file only grows: each checkpoint stands there with the proof that it extends the one
# before. Published, in a repository or in print, it cannot be taken back.
#
# %%
key = owner.attestation.binding.log_key  # bound by the enclave's evidence
log = memory.mirror(key)
owner.sync()
anchor, _ = anchors.post(folder / "anchor", log.seen(), log)
print(f"posted: {anchor.heads[-1].size} entries of {anchor.log.name}")

# %% [markdown]
# The chain has a contract that one account posts to. It is made for one log, whose key it names.
#
# %%
organiser, stranger = Account(os.urandom(32)), Account(os.urandom(32))
chain = Chain(organiser, stranger)
address, gas = chain.deploy(organiser, contract.creation(organiser.address, key))
print(f"contract 0x{address.hex()}, {gas:,} gas")


def post(newest, by=organiser):
    """The newest checkpoint of an anchor's file, to the contract."""
    head, said = newest.heads[-1], newest.posts[-1]
    return chain.send(by, address, contract.post(head.size, head.root, said.proof))


print(f"first checkpoint: {post(anchor):,} gas")

# %% [markdown]
# ## The job, and its receipt
#
# %%
torch.manual_seed(0)
model = torch.nn.Linear(8, 2)
run = scientist.train(
    model,
    [dataset.id],
    loss="cross_entropy",
    optimizer="sgd",
    lr=1.0,
    batch_size=rows // 8,
    steps=40,
    dp=cm.DP(2.0, 1e-5, clip=1.0),
)
run.watch()
run.weights(into=model)
held_out, truth = survey(1000, seed=2)
with torch.no_grad():
    guessed = model(torch.tensor(held_out)).argmax(1).numpy()
print(f"held-out accuracy {(guessed == truth).mean():.1%}, epsilon 2")

# %% [markdown]
# ## Anchored
#
# The organiser posts the log's newest checkpoint, which covers the job. The proof leads there.
#
# %%
owner.sync()
anchor, _ = anchors.post(folder / "anchor", log.seen(), log)
print(f"next checkpoint, with the proof that the log has only grown: {post(anchor):,} gas")

proof = anchors.prove(run.bundle, trust=trust, anchor=anchors.load(folder / "anchor"), mirror=log)
for check in anchors.check(proof, anchor=anchor, bundle=run.bundle, trust=trust):
    print(f"  {check.name:9} {check.state:9} {check.found}")

answer, gas = chain.ask(address, contract.of_proof(proof))
print(f"the chain: this receipt stands in the log: {bool(int.from_bytes(answer))}, {gas:,} gas")

# %% [markdown]
# ## Almost right
#
# %%
found = checkpoint.read_proof(proof.proof)
receipt, size = bytes.fromhex(proof.receipt.removeprefix("sha256:")), anchor.heads[-1].size


def ask(receipt, path):
    return chain.call(
        address, contract.verify_receipt(receipt, proof.salt, proof.entry, size, path)
    )


def flipped(word):
    return bytes([word[0] ^ 1, *word[1:]])


path = found.path
attempts = {
    "another receipt": lambda: ask(flipped(receipt), path),
    "a path with one bit changed": lambda: ask(receipt, (*path[:-1], flipped(path[-1]))),
    "a path without its last hash": lambda: ask(receipt, path[:-1]),
    "a path with one hash more": lambda: ask(receipt, (*path, path[-1])),
    "a stranger's checkpoint": lambda: post(anchor, by=stranger),
    "a checkpoint in place of another": lambda: post(anchor),
}
assert int.from_bytes(ask(receipt, path)) == 1
for name, attempt in attempts.items():
    try:
        attempt()
    except Reverted as e:
        print(f"  {name}: refused, {e}")
    else:
        raise AssertionError(f"{name} was accepted")

# %% [markdown]
# ## What the chain does not check
#
# %%
print("""
The contract checks SHA-256 alone: neither the Ed25519 signature under the log's checkpoint nor
the TEE's evidence (here simulated). Who trusts a root on the chain trusts the account that posts
there. It cannot take a posted root back, or post one that does not extend it; but it could begin
with a log of its own making. So hold the roots on the chain against the anchor's file, where each
is signed; ask for cosignatures of witnesses, who saw one log grow; and verify the receipt itself:
casemate receipt verify, casemate receipt anchored --receipt.""")
owner.close()
scientist.close()
server.terminate()
server.wait()
shutil.rmtree(folder)
