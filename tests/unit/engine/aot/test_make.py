"""A quoted job's native step, from its packed model: made, made again alike, and refused."""

import hashlib
from dataclasses import replace

import pytest

from casemate.engine.aot import build, make
from casemate.engine.aot.build import Artifact
from casemate.spec.errors import ModelError
from casemate.spec.job import Flip, Views
from support import engine_lab as lab
from support import native_lab as native

GRAPH, WEIGHTS = lab.mlp([6, 5, 3])
PACKED, SCHEMA = lab.packed(GRAPH, WEIGHTS), lab.schema(6, 3, 64)
TRAIN = lab.spec_of(8, 3)
PLAN = replace(lab.plan_of(TRAIN, 64, 53), microbatch=8)


def made(train=TRAIN, packed=PACKED, ways=None):
    return make.make(packed, PLAN, train, [SCHEMA], lab.BINDINGS, ways)


def test_an_artifact_of_a_job_and_its_manifest(monkeypatch):
    right, ways = build.build, ["rank-one", "formed", "rank-one", "formed"]

    def once(step):
        return Artifact(native.kept("made", lambda: right(step).program), step)

    monkeypatch.setattr(build, "build", once)
    one = made(ways=ways)
    found = one.manifest(PLAN)
    assert found["artifact"] == hashlib.sha256(one.artifact.program).hexdigest()
    assert found["bytes"] == len(one.artifact.program) > 10_000
    assert (found["clip"], found["grid"], found["rows"]) == (PLAN.clip, PLAN.grid, 8)
    assert found["ways"] == ways and found["differs"] <= 1e-5


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"privacy": replace(TRAIN.privacy, clipping="per-layer")}, "flat"),
        ({"privacy": lab.spec_of(8, 3, private=False).privacy}, "private"),
        ({"views": Views(count=2)}, "views"),
        ({"views": Views(transforms=(Flip(),))}, "views"),
    ],
    ids=str,
)
def test_a_job_that_only_the_engine_runs_is_refused(changed, why):
    with pytest.raises(ModelError, match=why) as e:
        made(replace(TRAIN, **changed))
    assert e.value.code == "model.native" and e.value.mend


@pytest.mark.parametrize("ways", [[], ["formed"], ["none"] * 4])
def test_the_ways_of_another_model_are_refused(ways):
    with pytest.raises(ModelError, match="ways are not of this model"):
        made(ways=ways)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    _, step = native.stepped("images")
    with pytest.raises(ModelError, match="no C\\+\\+ compiler") as e:
        build.build(step)
    assert e.value.code == "model.native" and "Install" in e.value.mend
