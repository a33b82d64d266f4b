# %% [markdown]
# # A contest that nobody can cheat in
#
# A hospital has a test set that no participant may see, and participants have models that the
# hospital may not see. An enclave scores sealed models on sealed rows. One participant cheats, by
# every way that there is; the leaderboard is made of receipts that anyone verifies offline. In the
# end the hospital buys the model that won.
#
# One server runs beside this script, and its TEE is **simulated**. `python examples/contest.py`, or
# the notebook of the same name.
#
# %% [markdown]
# ## The operator: a server
#
# %%
import atexit
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import casemate as cm
from casemate.client import contests

folder = Path(tempfile.mkdtemp(prefix="casemate-contest-"))
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
trust = cm.Trust.simulated(place["root"])
print(f"SIMULATED TEE at {place['url']}: it protects nothing, and proves nothing to others")


def join(name):
    """A party of its own, which verifies the enclave's evidence first."""
    who = cm.Identity.generate(name)
    return cm.connect(place["url"], trust=trust, identity=who, memory=None)


hospital, anna, boris, mallory = (join(n) for n in ("hospital", "anna", "boris", "mallory"))

# %% [markdown]
# ## The hospital: a private test set and a contest
#
# Ten measurements of each person, and which of three findings there is. Everybody trains on rows of
# their own; the hospital's are for the contest alone, for ever: three entries of each participant,
# each scored exactly, until the hospital signs the next epoch.
#
# %%
rule = np.random.default_rng(0).standard_normal((10, 3))


def cohort(people, seed):
    """Measurements in [-4, 4], and findings by a rule with some noise."""
    made = np.random.default_rng(seed)
    x = made.standard_normal((people, 10)).clip(-4, 4).astype(np.float32)
    return x, (x @ rule + made.standard_normal((people, 3))).argmax(1).astype(np.int64)


x, y = cohort(600, seed=1)
policy = cm.Policy(
    [p.identity.id for p in (anna, boris, mallory)],
    evaluation=True,
    evaluations=100,
    last_epoch=0,
    contest=cm.Contest("y", {"accuracy": 1, "cross_entropy": 10}, entries=3),
)
held = hospital.datasets.push(
    {"x": x, "y": y},
    name="findings",
    policy=policy,
    budget=cm.Budget(1, 1e-5),
    label="y",
    bounds={"x": (-4, 4)},
    classes={"y": 3},
)
print(held)

# %% [markdown]
# ## The participants
#
# Anna and Boris train on rows of their own, and enter. What they send is sealed to the enclave.
#
# %%


def fitted(people, seed, steps):
    """A model of somebody who has so many rows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    measured, found = (torch.from_numpy(a) for a in cohort(people, seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(measured), found).backward()
        optimizer.step()
    return model


best = fitted(2000, 2, 120)
for party, model in ((anna, best), (boris, fitted(60, 3, 40))):
    run = party.enter(model, held.id).watch(progress=False)
    receipt = run.receipt.receipt
    shown = ", ".join(
        f"{m.name} {s:.3f}" for m, s in zip(receipt.metrics, receipt.scores, strict=True)
    )
    print(f"{party.identity.public.name}: {shown}. {receipt.guarantee.statement}")

# %% [markdown]
# ## Mallory cheats
#
# %%


def attempt(what, work):
    try:
        work()
    except cm.CasemateError as e:
        print(f"  {what}: {e.code}. {e.message}")
    else:
        print(f"  {what}: WENT THROUGH")


class Mixing(nn.Module):
    """Looks at the other records of the batch."""

    def forward(self, x):
        return (x - x.mean(0))[:, :3]


class Reader(nn.Module):
    """Takes the label as an input, and gives it back."""

    def forward(self, x, y):
        return nn.functional.one_hot(y, 3).float()


print("What is refused:")
attempt(
    "to train on the test set",
    lambda: mallory.train(
        fitted(60, 4, 0), [held.id], loss="cross_entropy", dp=cm.DP(1.0, 1e-5),
        optimizer=cm.SGD(0.1), batch_size=60, steps=5,
    ),
)  # fmt: skip
attempt(
    "a metric of her own, which is always 1",
    lambda: mallory.evaluate(
        fitted(60, 4, 0), [held.id], metrics={"accuracy": lambda out, y: out[:, 0] * 0 + 1}
    ),
)
attempt(
    "a model that is fed the label", lambda: mallory.enter(Reader(), held.id, inputs={"y": "y"})
)
attempt("a model that looks at other records", lambda: mallory.enter(Mixing(), held.id))
for guess in (5, 6, 7):
    mallory.enter(fitted(60, guess, 5), held.id).watch(progress=False)
attempt("a fourth entry", lambda: mallory.enter(fitted(60, 8, 5), held.id))

# %% [markdown]
# ## The end: by a signed epoch, not by a clock
#
# %%
hospital.datasets.advance_epoch(held.id, 1)
attempt("an entry after the end", lambda: anna.enter(fitted(2000, 2, 200), held.id))

board = hospital.leaderboard(held.id)
board.save(folder / "leaderboard.json")
print(board)

# %% [markdown]
# ## Anyone: verify it offline
#
# Every receipt is checked against the enclave's evidence and its log; so is that all entries were
# scored by the same rules, and their order.
#
# %%
print(contests.verify(contests.load(folder / "leaderboard.json"), trust))
first, second, *rest = board.source.entries
forged = type(board.source)(dataset=held.id, entries=(second, first, *rest))
attempt("a leaderboard in another order", lambda: contests.verify(forged, trust))

# %% [markdown]
# ## The sale: the model that won, and no other
#
# Anna deploys her model, sealed, and signs it over to the hospital. What the hospital pulls has the
# digest that stands in the winning entry's receipt. On the command line: `casemate model grant`,
# `model pull` and `receipt verify`.
#
# %%
nobody = cm.ServePolicy([anna.identity.id])
deployed = anna.deploy(best, nobody, example=torch.zeros(1, 10), name="findings")
sale = anna.models.grant(deployed, hospital.identity.id, "for use in one hospital")
bought = hospital.models.pull(sale.id)
won = board.entries[0].receipt.model_digest
print(f"bought: {len(bought.data)} bytes, the winner's model: {bought.digest == won}")
print(hospital.models.receipt(sale.id, bought))
attempt("somebody else pulls it", lambda: mallory.models.pull(sale.id))

# %%
server.terminate()
server.wait()
shutil.rmtree(folder)
