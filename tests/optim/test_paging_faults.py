"""What goes wrong while state pages: interrupts, kills, little memory, disks that fail and disks that are full.

Each case runs in a process of its own, with a real signal, limit or error of the system. Half of a step's bytes have
passed when it is spoiled.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

MIDWAY = "an update failed midway: load the parameters and the state from a checkpoint"

# 5 million elements: 40 MB of state in 10 chunks, with room for 4. Gradients change with every step.
COMMON = """
import functools, hashlib, json, os, resource, signal
from pathlib import Path
import torch
import qloralab as ql
from qloralab.optim.paged_lion import PagedLion

BUDGET, CHUNK, NUMELS = 2**24, 2**22, [1_000_003, 5, 2_600_000, 1_404_096]
noise = torch.randn(2**22, generator=torch.Generator().manual_seed(3))
params = [torch.nn.Parameter(noise[i:][:numel].clone()) for i, numel in enumerate(NUMELS)]

def give(step):
    for i, param in enumerate(params):
        param.grad = noise[997 * step + 101 * i :][: param.numel()].clone()

def make(kind=ql.PagedAdamW, **options):
    return kind(params, **{"lr": 0.1, "budget": BUDGET, "state_dir": folder, **options})

def steps(optimizer, *numbers):
    for step in numbers:
        give(step)
        optimizer.step()

def save(optimizer):
    values = [param.detach() for param in params]
    torch.save({"params": values, "optimizer": optimizer.state_dict()}, folder / "new")
    os.replace(folder / "new", folder / "checkpoint")

def load(optimizer):
    loaded = torch.load(folder / "checkpoint", mmap=True, weights_only=True)
    for param, value in zip(params, loaded["params"]):
        param.data.copy_(value)
    optimizer.load_state_dict(loaded["optimizer"])

def digest(*state):
    found = hashlib.sha256()
    for tensor in (*params, *state):
        found.update(tensor.detach().numpy())
    return found.hexdigest()

def state(optimizer):
    return [value for param in params for value in optimizer.state[param].values()]

def pager(optimizer):
    (device,) = optimizer._storage.devices.values()
    return device.pager

def file(optimizer):
    # Its descriptor and size, when nothing is on its way.
    pager(optimizer).settle()
    arena = optimizer._storage.parts[0].moments.arena
    return arena._file.fileno(), len(arena.bytes)

def midway(optimizer, act):
    # Act when half of the bytes of the next step have come, between two chunks.
    one = pager(optimizer)
    enough, acquire = one.counters.fetched + 20 * 2**20, one.acquire
    def acquire_and_act(chunk):
        acquire(chunk)
        if one.counters.fetched >= enough:
            one.acquire = acquire
            act()
    one.acquire = acquire_and_act

def caught(call):
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

def answer(**found):
    Path(answer_to).write_text(json.dumps(found))
"""

# Its processes are forked where torch has been imported, and has done nothing yet.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "qloralab.optim.paged_adamw", "qloralab.kernels.cpu.library"])


def child(code: str, folder: Path, exitcode: int = 0, **names: Any) -> dict[str, Any]:
    """What a process answers that runs the common code and this, with a folder and more names."""
    file = folder.with_suffix(".answer")
    process = FORKS.Process(target=exec, args=(COMMON + code, {"folder": folder, "answer_to": file, **names}))
    process.start()
    process.join(120)
    assert process.exitcode == exitcode, "what it wrote to stderr is above"
    return json.loads(file.read_text()) if exitcode == 0 else {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    """The digest of parameters and state after 1, 2, ... steps that nothing disturbs."""
    return child(UNDISTURBED, tmp_path_factory.mktemp("undisturbed"))["found"]


UNDISTURBED = """
optimizer, found = make(budget=None), []
for step in range(6):
    steps(optimizer, step)
    found.append(digest(*state(optimizer)))
answer(found=found)
"""


def test_ctrl_c_waits_for_a_whole_step(undisturbed, tmp_path):
    code = """
optimizer, sent = make(), []
steps(optimizer, 0)
give(1)
def interrupt():
    sent.append(optimizer._broken)
    os.kill(os.getpid(), signal.SIGINT)
midway(optimizer, interrupt)
raised = caught(optimizer.step)
after_two = digest(*state(optimizer))
steps(optimizer, 2)
answer(raised=raised, sent=sent, two=after_two, three=digest(*state(optimizer)))
"""
    found = child(code, tmp_path)
    assert found["raised"] == "KeyboardInterrupt: "
    assert found["sent"] == [MIDWAY], "the update was over before"
    assert (found["two"], found["three"]) == (undisturbed[1], undisturbed[2])


def test_ctrl_c_in_a_backward_that_updates_waits_for_a_whole_parameter(tmp_path):
    code = """
optimizer = make(update_in_backward=True)
before = [param.detach().clone() for param in params]
midway(optimizer, lambda: os.kill(os.getpid(), signal.SIGINT))
raised = caught(sum(param.sum() for param in params).backward)
changed = [bool((param != old).all()) for param, old in zip(params, before)]
same = [torch.equal(param, old) for param, old in zip(params, before)]
answer(raised=raised, changed=changed, same=same, then=caught(optimizer.step))
"""
    found = child(code, tmp_path)
    assert found["raised"] == "KeyboardInterrupt: "
    assert all(changed != same for changed, same in zip(found["changed"], found["same"], strict=True))
    assert any(found["changed"])
    assert any(found["same"])
    assert found["then"] == "nothing"


@pytest.mark.parametrize("kind", ["AdamW", "Lion"])
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(kind, undisturbed, tmp_path):
    chosen = "make = functools.partial(make, PagedLion, budget=BUDGET // 2)" if kind == "Lion" else ""
    if chosen:
        (tmp_path.with_name("lion")).mkdir()
        undisturbed = child(chosen + UNDISTURBED, tmp_path.with_name("lion"))["found"]
    code = """
optimizer, first = make(), 3 if (folder / "checkpoint").exists() else 0
if first:
    load(optimizer)
for step in range(first, 6):
    give(step)
    if step == kill_in:
        midway(optimizer, lambda: os.kill(os.getpid(), signal.SIGKILL))
    optimizer.step()
    if step == 2:
        save(optimizer)
answer(first=first, digest=digest(*state(optimizer)))
"""
    code = chosen + code
    child(code, tmp_path, -signal.SIGKILL, kill_in=4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "the file of the state has no name"
    assert child(code, tmp_path, kill_in=None) == {"first": 3, "digest": undisturbed[5]}


def test_within_a_limit_on_memory_that_is_too_small_for_torch(undisturbed, tmp_path):
    code = """
def load_code():
    for kind in (torch.optim.AdamW, ql.PagedAdamW):
        one = torch.nn.Parameter(torch.zeros(256))
        one.grad = torch.zeros(256)
        kind([one]).step()

def private():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024

give(0)
load_code()
torch.zeros(1)
spare = 2 * 16 * 2**20  # for the stacks of two threads, with their arenas, and tables
limit = private() + BUDGET + spare
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    optimizer = make() if which == "ours" else torch.optim.AdamW(params)
    for step in range(3):
        if step:
            for i, param in enumerate(params):
                param.grad.copy_(noise[997 * step + 101 * i :][: param.numel()])
        optimizer.step()
except (RuntimeError, MemoryError) as error:
    answer(error=str(error))
else:
    answer(digest=digest(*state(optimizer)))
"""
    assert "can't allocate memory" in child(code, tmp_path, which="torch")["error"]
    assert child(code, tmp_path, which="ours") == {"digest": undisturbed[2]}


def test_a_failed_write_is_told_behind_the_step_and_loading_recovers(undisturbed, tmp_path):
    code = """
optimizer = make()
steps(optimizer, 0)
save(optimizer)
descriptor, _ = file(optimizer)
whole, null = os.dup(descriptor), os.open("/dev/null", os.O_RDWR)
midway(optimizer, lambda: os.dup2(null, descriptor))  # which has no ranges to write: ESPIPE
give(1)
raised = caught(optimizer.step)
updated = digest()
refused = [caught(optimizer.step), caught(optimizer.state_dict)]
still = digest()
os.dup2(whole, descriptor)
load(optimizer)
steps(optimizer, 1, 2)
recovered = digest(*state(optimizer))
unpaged = make(budget=None)
load(unpaged)
steps(unpaged, 1)
answer(raised=raised, refused=refused, updated=updated, still=still, expected=digest(), recovered=recovered)
"""
    found = child(code, tmp_path)
    lost = "All parameters were updated, but a part of the state is lost: load both from a checkpoint"
    assert found["raised"].startswith("OSError: [Errno 29] the optimizer's state could not be written to a file in ")
    assert found["raised"].endswith(lost)
    assert all(one.startswith("RuntimeError: ") and one.endswith(lost) for one in found["refused"])
    assert found["updated"] == found["still"] == found["expected"]
    assert found["recovered"] == undisturbed[2]


def test_a_failed_read_is_an_error_and_no_signal_and_loading_recovers(undisturbed, tmp_path):
    code = """
optimizer = make()
steps(optimizer, 0)
save(optimizer)
descriptor, whole = file(optimizer)
os.ftruncate(descriptor, whole - CHUNK // 2)  # without the last chunk, which is away
give(1)
raised = [caught(optimizer.step)]
refused = [caught(optimizer.step), caught(optimizer.state_dict)]
raised.append(caught(lambda: load(optimizer)))
os.ftruncate(descriptor, whole)
load(optimizer)
steps(optimizer, 1, 2)
answer(raised=raised, refused=refused, digest=digest(*state(optimizer)))
"""
    found = child(code, tmp_path)
    message = "OSError: [Errno 14] the optimizer's state could not be read from a file in "
    assert [one.startswith(message) for one in found["raised"]] == [True, True]
    assert found["refused"] == [f"RuntimeError: {MIDWAY}"] * 2
    assert found["digest"] == undisturbed[2]


def test_a_forked_process_is_told_that_the_state_is_of_another(undisturbed, tmp_path):
    code = """
optimizer = make()
steps(optimizer, 0)
reading, writing = os.pipe()
give(1)
if os.fork() == 0:
    os.write(writing, caught(optimizer.step).encode())
    os._exit(0)
os.wait()
optimizer.step()
answer(raised=os.read(reading, 1000).decode(), digest=digest(*state(optimizer)))
"""
    found = child(code, tmp_path)
    assert found["raised"].startswith("RuntimeError: the state pages to a file of another process")
    assert found["digest"] == undisturbed[1]


# A full disk, for one process: files cannot grow beyond a limit.
FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, resource.RLIM_INFINITY))
"""
TOO_LARGE = "OSError: [Errno 27] "


def test_a_full_disk_is_an_error_at_the_construction(tmp_path):
    code = f"before = digest(){FULL}answer(raised=caught(make), same=before == digest(), left=os.listdir(folder))"
    found = child(code, tmp_path)
    assert found["raised"].startswith(TOO_LARGE)
    assert found["same"]
    assert found["left"] == []


def test_a_full_disk_leaves_an_optimizer_as_it_was_before_the_group(undisturbed, tmp_path):
    code = f"""
optimizer = ql.PagedAdamW([params[0], params[1], params[3]], lr=0.1, budget=9 * CHUNK, state_dir=folder)
before = repr(optimizer.state_dict()["param_groups"])
{FULL}
raised = [caught(lambda: optimizer.add_param_group({{"params": params[2:3]}})) for _ in range(2)]
after = repr(optimizer.state_dict()["param_groups"])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before_group = optimizer.paging().where
optimizer.add_param_group({{"params": params[2:3]}})
steps(optimizer, 0, 1, 2)
where = [before_group, optimizer.paging().where]
answer(raised=raised, same=before == after, digest=digest(*state(optimizer)), where=where)
"""
    found = child(code, tmp_path)
    assert [one.startswith(TOO_LARGE) for one in found["raised"]] == [True, True]
    assert found["same"]
    assert found["digest"] == undisturbed[2]
    assert found["where"] == ["memory of cpu", f"memory of cpu, a file in {tmp_path}"]
