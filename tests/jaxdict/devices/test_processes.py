"""What processes of a run agree on, in two real ones; alone, a process waits for nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxdict.devices import Processes

CODE = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxdict.devices import Processes

number = int(sys.argv[2])
processes = Processes.join(sys.argv[1], count=2, number=number)
found = {"several": processes.several, "chief": processes.chief}
found["agreed"] = [
    processes.agree(number == 1), processes.agree(False), processes.agree(True, ask=False)
]
called = []

def act(value):
    called.append(value)
    if value is None:
        raise FileExistsError("taken")
    return value

found["from chief"] = [processes.from_chief(lambda v=v: act(v), refusal="no") for v in (True, False)]
try:
    processes.from_chief(lambda: act(None), refusal="process 0 refused")
except (ValueError, OSError) as error:
    found["refused"] = f"{type(error).__name__}: {error}"
found["called"] = called
processes.barrier("here")
rows = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
whole = np.arange(8.0).reshape(4, 2)
split = jax.make_array_from_callback(whole.shape, rows, lambda at: whole[at])
state = processes.gathered({"split": split, "own": jax.numpy.ones(3)})
found["gathered"] = {name: leaf.tolist() for name, leaf in state.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def both():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(number)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    found = []
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-4000:]
        found.append(json.loads(out.splitlines()[-1]))  # Gloo writes a line of its own
    return found


def test_two_processes_agree_when_they_are_asked(both):
    assert [one["several"] for one in both] == [True, True]
    assert [one["chief"] for one in both] == [True, False]
    assert both[0]["agreed"] == both[1]["agreed"] == [True, False, False]


def test_process_0_acts_for_both_and_its_refusal_ends_both(both):
    assert [one["called"] for one in both] == [[True, False, None], []]
    assert both[0]["from chief"] == both[1]["from chief"] == [True, False]
    assert both[0]["refused"] == "FileExistsError: taken"
    assert both[1]["refused"] == "ValueError: process 0 refused"


def test_each_process_gets_the_whole_of_what_is_split(both):
    whole = {"split": np.arange(8.0).reshape(4, 2).tolist(), "own": [1.0] * 3}
    assert both[0]["gathered"] == both[1]["gathered"] == whole


def test_alone_a_process_is_the_chief_and_nothing_is_copied():
    alone = Processes.join("", count=0, number=-1)
    assert alone.chief and not alone.several
    assert alone.agree(True, ask=False) and not alone.agree(False)
    assert alone.from_chief(lambda: True, refusal="no")
    with pytest.raises(FileExistsError, match="taken"):
        alone.from_chief(lambda: (_ for _ in ()).throw(FileExistsError("taken")), refusal="no")
    state = {"weights": np.ones(3)}
    assert alone.gathered(state) is state
