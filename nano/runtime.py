"""Devices and ranks: what differs between a CPU, one GPU and many GPUs. nano/xla.py does the same
for TPUs.

    rt = runtime.start(cfg)              # from the keys device=, parallel=, dtype= ... (KEYS)
    net = rt.wrap(model)                 # DDP, FSDP2, XLA SPMD, or the model itself
    rt.accumulate(last, net)             # before each micro-batch's forward
    with rt.autocast():
        loss = f(net, rt.put(batch))     # put: CPU tensors -> this device
    rt.backward(loss)                    # reduces gradients over ranks in the last micro-batch
    norm = rt.step(optimizer, params, lr, grad_clip)
    n = rt.all_sum(n)                    # a sum over all ranks
    with rt.evaluating(net): ...         # evaluation mode, no gradients

    @runtime.started                     # gives back what the runtime took, however main ends
    def main(cfg, rt): ...

One process runs per device. They communicate through gloo (CPU) or nccl (CUDA). With tensor=N, N
neighbouring devices share each layer and see the same rows (nano/tensor.py). `rank` and `world`
count such groups, and sums over ranks count a group once.
"""

import contextlib
import ctypes
import functools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter

try:
    import resource
except ImportError:
    resource = None  # Windows

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

from model import Experts, ScoreHead
from nano import generate, losses, optim, quant, tensor
from nano.config import UserError
from nano.quant import QuantLinear

KEYS = ("device", "parallel", "dtype", "seed", "offload", "tensor", "reduce_dtype")
TRIM = 30.0  # seconds between two trims of the heap; the step after one takes a second longer


def start(cfg, **settings):
    """The Runtime of this process, from those of KEYS that a script's config has. `settings`
    override them. UserError for keys that do not fit the machine or each other."""
    if resource is None:
        raise UserError("Windows is not supported: run this in its Linux subsystem (WSL)")
    settings = {key: getattr(cfg, key) for key in KEYS if hasattr(cfg, key)} | settings
    if settings["device"] == "xla":
        from nano.xla import XLA  # here, because nano.xla imports this module

        return XLA(**settings)
    return Runtime(**settings)


def started(main):
    """Decorates a stage's main(cfg, rt), which is then called as main(cfg).

    When it ends, in whatever way, the process has its signal handlers back, and no lock is left. So
    a notebook or a thread may call one stage after another."""

    @functools.wraps(main)
    def with_runtime(cfg):
        with start(cfg) as rt:
            return main(cfg, rt)

    return with_runtime


class Runtime:
    """The devices and processes of a run, on CPU and CUDA. Each process has one.

    process: its number among `processes`, of which `local_world` run on this node. rank, world: the
    same, but a tensor group counts once. shards: how many parts a global batch is sharded into."""

    fixed_shapes = False  # True: each new shape is compiled, so batches must keep theirs

    def __init__(
        self,
        device="auto",
        parallel="ddp",
        dtype="auto",
        seed=0,
        offload=False,
        tensor=1,
        reduce_dtype="float32",
    ):
        if tensor > 1 and offload:
            raise UserError(f"tensor={tensor} must be 1 with offload=true")
        self.parallel = parallel
        self.offload = offload
        self.tensor = tensor
        self.reduce_dtype = getattr(torch, reduce_dtype)
        self.rank = self.process = 0
        self.world = self.processes = self.local_world = self.shards = 1
        self.grid = None  # DeviceMesh of the processes: replicate, shard, tensor
        self.group = None  # one process of each tensor group, for sums over ranks
        self._libc = None
        self._start(device)
        self.is_main = self.process == 0
        if dtype == "auto":
            dtype = "bfloat16" if has_fast_bf16(self.device) else "float32"
        self.dtype = getattr(torch, dtype)
        self._trimmed = time.monotonic()
        self.signal = 0  # the number of the signal that asked the run to stop
        self.cleanup = contextlib.ExitStack()  # what `with rt:` gives back at its end
        self._saving_group = None
        self.saving = None  # waits for the training state that is being written in the background
        self.seed(seed)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            # A rank that failed leaves at once. Its peers may be in a collective, and no longer
            # answer.
            if kind is None or self.processes == 1:
                self.close()
        finally:
            self.cleanup.close()

    # ---------------------------------------------------------------------------------------- start

    def _start(self, device):
        """Chooses the device, joins the other processes and creates the groups of devices."""
        device = choose_device(device)
        self.process, self.processes, local_rank, self.local_world = join(device)
        if device == "mps" and self.processes > 1:
            raise UserError(
                f"device=mps is a single GPU, which {self.processes} processes cannot share: "
                "start one, without torchrun"
            )
        if self.local_world % self.tensor:
            raise UserError(
                f"tensor={self.tensor} must divide the number of processes of a node, "
                f"{self.local_world}"
            )
        self.rank = self.process // self.tensor
        self.world = self.shards = self.processes // self.tensor
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self._libc = _tune_cpu()
        if self.processes > 1 and (self.tensor > 1 or self.parallel not in ("ddp", "none")):
            nodes = self.processes // self.local_world
            copies = dict(ddp=self.world, hsdp=nodes).get(self.parallel, 1)  # of the whole model
            shape = (copies, self.world // copies, self.tensor)
            self.grid = init_device_mesh(
                device, shape, mesh_dim_names=("replicate", "shard", "tensor")
            )
        if self.tensor > 1:
            ranks = [list(range(i, self.processes, self.tensor)) for i in range(self.tensor)]
            self.group, _ = dist.new_subgroups_by_enumeration(ranks)

    @property
    def name(self):
        """The product's name on CUDA, by which log.py knows its peak FLOPs; elsewhere the type."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    @property
    def devices(self):
        return self.shards * self.tensor

    @property
    def weight_shards(self):
        """Devices over which weights, gradients and moments are sharded."""
        if self.parallel == "hsdp":
            return self.local_world
        return self.devices if self.parallel in ("fsdp", "zero2") else self.tensor

    # ---------------------------------------------------------------------------------------- model

    def wrap(self, model, compile=False, grad_checkpoint=False):
        """Moves the model to the device and makes it parallel -> what to call, with the model's
        attributes. Parameters keep their names. UserError for settings that do not fit."""
        if self.offload and self.weight_shards == 1:
            raise UserError(
                "offload=true keeps in CPU memory what fsdp, zero2 or hsdp shards: "
                "set parallel= to one of them"
            )
        self.distribute(model, compile, grad_checkpoint)
        return self.wrap_ddp(model)

    def distribute(self, model, compile=False, grad_checkpoint=False):
        """The part of `wrap` that a model needs even without training: all but DDP."""
        if self.world > 1 and self.parallel == "none":
            raise UserError(f"{self.world} processes need parallel=ddp or parallel=fsdp")
        if compile and self.device.type == "mps":
            raise UserError("compile=true is for cpu and cuda: leave it out with device=mps")
        tensor.check(model.cfg, self.tensor)
        if self.tensor > 1 and quant.layers(model):
            raise UserError(
                f"tensor={self.tensor} cannot share the layers of a quantised model: leave it out, "
                "and shard it with parallel=fsdp"
            )
        if grad_checkpoint:
            model.recompute = self.recompute
        losses.compiled = compile  # a global, because a process compiles all of its models or none
        if compile:
            for layer in model.layers:
                layer.compile()
        if self.grid is not None and self.tensor > 1:
            tensor.shard(model, self.grid["tensor"], lambda *p: parameter_dtype(*p, self.dtype))
        if self.grid is not None and self.world > 1:
            shard_layers(model, self)
        else:
            for module in (*model.layers, model):
                cast_parameters(module, self.dtype)
                module.to(self.device)

    def wrap_ddp(self, model, params=None):
        """The part of `wrap` that averages gradients over ranks -> what to call in training.
        params {name: p}: what this net trains, where several nets share a trunk. None: all."""
        if self.world == 1 or self.parallel != "ddp" or self.tensor > 1:
            return model
        return DDP(model, params, self.reduce_dtype)

    def recompute(self, layer, *inputs):
        """Runs a layer whose activations the backward pass recomputes."""
        return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)

    # ----------------------------------------------------------------------------------------- step

    def micro_batch(self, n):
        """Rows of this process's forward, for n rows on each tensor group of devices."""
        return n * self.shards // self.world

    def put(self, batch):
        """The tensors of a batch, (B, ...) on the CPU -> the same on the device, on XLA sharded
        along B. What is no tensor is left out."""
        if not torch.is_grad_enabled():
            self.sync()  # ends the micro-batch before this one; in training backward() does that
        pin = self.device.type == "cuda"  # pinned memory is copied while the device computes
        return {
            name: (t.pin_memory() if pin else t).to(self.device, non_blocking=pin)
            for name, t in batch.items()
            if torch.is_tensor(t)
        }

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def accumulate(self, last, net):
        """Call this before a micro-batch's forward. DDP reduces gradients in the last backward
        alone; FSDP in each, because unsharded gradients take the memory that sharding saves."""
        if isinstance(net, DDP):
            net.require_backward_grad_sync = last

    def backward(self, loss):
        """Adds the gradients of `loss`, which is this rank's part of a global sum."""
        (loss * self.world).backward()  # DDP and FSDP average over ranks
        self.sync()

    def step(self, optimizer, params, lr, grad_clip):
        """Clips the gradients of `params` to a global norm of `grad_clip` (0: not at all), steps at
        learning rate `lr`, and drops the gradients -> the norm before clipping, a 0-d tensor, the
        same on all ranks. Where it is not finite, the step is skipped (optim.step). Nothing waits
        for the device."""
        optim.set_lr(optimizer, lr)
        norm = optim.clip_(params, grad_clip)
        optim.step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)
        self.sync()
        return norm

    @contextlib.contextmanager
    def evaluating(self, net):
        """Within it: evaluation mode and no gradients. After it: training mode. FSDP leaves the
        root unit (embedding, head) gathered until a backward. named_parameters() would return the
        gathered copies, so this reshards it."""
        net.eval()
        with torch.no_grad():
            yield
            self.sync()
        if hasattr(net, "reshard"):
            net.reshard()
        net.train()

    def init_moments(self, optimizer):
        """On XLA, creates and shards the optimizer's state. Elsewhere the first step creates it."""

    def all_sum(self, x):
        """Sum of a tensor, or of a number, over all ranks."""
        if self.world == 1:
            return x
        t = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
        dist.all_reduce(t, group=self.group)
        return t if torch.is_tensor(x) else t.item()

    def sync(self):
        """Ends a forward, backward or step. XLA runs its graph here. A CPU returns free heap pages
        to the OS every 30 s, because rows of varying length fragment the heap by 1% a step."""
        if self._libc and time.monotonic() - self._trimmed > TRIM:
            self._libc.malloc_trim(0)
            self._trimmed = time.monotonic()

    def wait(self):
        """Waits until the device has done everything, for timing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def once(self, f, *args):
        """f(*args). On a TPU slice host 0 calls it for all hosts, whose results could differ."""
        return f(*args)

    def barrier(self):
        if self.processes > 1:
            dist.barrier()

    def compiles(self):
        """On XLA {"graphs": how many were compiled so far}, for the log. Elsewhere {}."""
        return {}

    # ---------------------------------------------------------------------------------------- state

    def seed(self, seed):
        """Seeds the global generators alike on all ranks. Rows are drawn by other generators."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def rng_state(self):
        """The states of the generators, {name: (processes, bytes)}. They differ between processes
        after dropout. A collective."""
        states = {}
        for name, (get, _) in self._generators().items():
            t = get()
            rows = [t.clone() for _ in range(self.processes)]
            if self.processes > 1:
                dist.all_gather(rows, t)
            states[name] = torch.stack(rows)
        return states

    def set_rng_state(self, state):
        """Restores what rng_state() returned. If the number of processes changed, every rank takes
        the state of process 0. States of other device types are ignored."""
        for name, (_, set_state) in self._generators().items():
            if name in state:
                rows = state[name]
                row = self.process if len(rows) == self.processes else 0
                set_state(rows[row].clone())

    def _generators(self):
        """{device type: how to get and how to set the state of its generator}."""
        generators = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
        if self.device.type == "cuda":
            generators["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
        elif self.device.type == "mps":
            generators["mps"] = (torch.mps.get_rng_state, torch.mps.set_rng_state)
        return generators

    def to_cpu(self, t):
        """The tensor on the CPU, without a gradient."""
        return t.detach().cpu()

    def gather(self, tensors):
        """{name: tensor} -> the same on the CPU, unsharded, on the main process; {} on others. A
        collective, which every process calls with the same names."""
        gathered = {}
        for name, t in tensors.items():
            t = self._unsharded(t)
            if self.is_main:
                gathered[name] = self.to_cpu(t).contiguous()
        return gathered

    def _unsharded(self, t):
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    def saving_group(self):
        """A gloo group of all processes, for saves that go on while the training does."""
        if self.processes > 1 and self._saving_group is None:
            self._saving_group = dist.new_group(backend="gloo")
        return self._saving_group

    def finish_saving(self):
        if self.saving:
            self.saving()
        self.saving = None

    def peak_memory(self):
        return peak_memory(self.device)

    # ----------------------------------------------------------------------------------------- stop

    def should_stop(self):
        """True on every rank as soon as one was asked to stop."""
        number = torch.tensor(self.signal)  # on the CPU, where asking costs no device sync
        if self.processes > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.signal = int(number)
        return self.signal > 0

    def close(self):
        self.finish_saving()
        if dist.is_initialized():
            dist.destroy_process_group()


def catch_signals(rt):
    """From here on SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 ask the loop to stop after its step
    (`rt.should_stop`). A second SIGTERM or Ctrl-C ends the process at once.

    A signal that is ignored stays so (nohup). `with rt:` gives the handlers back. Python lets
    the main thread alone have handlers, so a run in another thread is not asked."""

    def handler(number, frame):
        rt.signal = number
        text = "finishing this step, then saving"
        if number in (signal.SIGTERM, signal.SIGINT):
            default = signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
            signal.signal(number, default)
            text += " (again: stop at once)"
        if rt.is_main:
            # the terminal may be gone, or a line may be on its way to it
            with contextlib.suppress(OSError, RuntimeError):
                print(f"\n{signal.Signals(number).name}: {text}", flush=True)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            kept = signal.getsignal(number)
            if kept not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
                rt.cleanup.callback(signal.signal, number, kept)


def choose_device(device):
    """auto, cpu, cuda or mps -> the device's type; auto is cuda where there is one, else cpu.
    UserError for another, and for a device that this torch does not find."""
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),  # Apple's GPUs
    }
    if device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if device not in there:
        raise UserError(f"device={device}: use auto, cpu, cuda, mps or xla")
    if not there[device]:
        raise UserError(f"device={device}: this torch ({torch.__version__}) finds no such device")
    return device


def has_fast_bf16(device):
    """Whether matrix products in bfloat16 are faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "xla" or generate.has_fast_bf16()


def peak_memory(device):
    """Peak memory in bytes, of the device on CUDA, of the process elsewhere. On Apple's GPUs it is
    what the driver has reserved, which hardly ever shrinks."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def join(device):
    """Joins the processes that torchrun started -> (process, processes, process of this node,
    processes of this node). UserError for an environment that torchrun did not set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ:
        return 0, 1, 0, 1
    if missing := [name for name in names if not os.environ.get(name)]:
        raise UserError(
            f"RANK is in the environment, but {' and '.join(missing)} is empty or not there: "
            "start it with torchrun, or unset RANK"
        )
    try:
        ranks = [int(os.environ[name]) for name in names[:4]]
    except ValueError as e:
        raise UserError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers ({e}): "
            "start it with torchrun, or unset RANK"
        ) from None
    if device == "cuda" and ranks[3] > (count := torch.cuda.device_count()):
        raise UserError(
            f"{ranks[3]} processes on this node share {count} devices: lower --nproc_per_node"
        )
    with at_once():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    sys.excepthook = end_at_once
    return ranks


@contextlib.contextmanager
def at_once():
    """Within it SIGTERM and Ctrl-C end the process. A handler in Python would wait until torch has
    met the other processes, which may take half an hour."""
    kept = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            kept[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def parameter_dtype(module, p, dtype):
    """fp32 for trained parameters, adapters and score heads. `dtype`, that of matrix products, for
    the rest. A quantised layer keeps its bytes."""
    if isinstance(module, QuantLinear):
        return p.dtype
    exact = p.requires_grad or isinstance(module, (ScoreHead, nn.ParameterDict))
    return torch.float32 if exact else dtype


def cast_parameters(submodule, dtype):
    """Casts a submodule's parameters to their training dtype.

    Called for one layer at a time, right before it is sharded. Until then parameters are views of
    the memory-mapped checkpoint, which the processes of a node share, so no process ever holds the
    whole model."""
    for module in submodule.modules():
        for p in module._parameters.values():
            if p is not None and p.dtype != (wanted := parameter_dtype(module, p, dtype)):
                p.data = p.data.to(wanted)


def shard_layers(model, rt):
    """FSDP2, with one unit for each layer, one for the experts in it, and a root unit for the rest.
    A layer moves to the device when it is sharded.

    Weights are gathered in rt.dtype, gradients are reduced in rt.reduce_dtype. fsdp gathers a layer
    when it is needed. zero2 keeps what the forward gathered for the backward. hsdp is fsdp within a
    node and replicates over nodes. ddp with tensor= only replicates. With offload, a device's
    shards of weights, gradients and moments stay in CPU memory, where the optimizer steps.
    """
    # imported here, because it takes a second that other runs need not wait
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    mesh = rt.grid["shard"] if rt.parallel in ("fsdp", "zero2") else rt.grid["replicate", "shard"]
    policy = OffloadPolicy()
    if rt.offload:
        policy = CPUOffloadPolicy(pin_memory=rt.device.type == "cuda")
    common = dict(mesh=mesh, reshard_after_forward=rt.parallel != "zero2", offload_policy=policy)
    mixed = MixedPrecisionPolicy(rt.dtype, rt.reduce_dtype)
    for layer in model.layers:
        cast_parameters(layer, rt.dtype)
        if quantised := [m for m in layer.modules() if isinstance(m, QuantLinear)]:
            fully_shard(quantised, **common)  # a unit of their own, gathered without a cast
        for module in layer.modules():
            if isinstance(module, Experts):
                fully_shard(module, mp_policy=mixed, **common)
        fully_shard(layer, mp_policy=mixed, **common)
    cast_parameters(model, rt.dtype)
    for module in model.modules():
        if isinstance(module, ScoreHead):  # gathered in fp32
            fully_shard(module, **common)
    common["reshard_after_forward"] = False  # losses use the head's weight after the forward
    fully_shard(model, mp_policy=mixed, **common)


class DDP(DistributedDataParallel):
    """DistributedDataParallel with the attributes of its module, such as net.cfg and
    net.head_weight, so that a stage needs the net alone."""

    def __init__(self, model, params, reduce_dtype):
        trainable = [p for p in model.parameters() if p.requires_grad]
        if params is not None:  # DDP averages the gradients of what requires one now
            model.requires_grad_(False)
            for p in params.values():
                p.requires_grad = True
        super().__init__(model, gradient_as_bucket_view=True)
        if reduce_dtype == torch.bfloat16:
            self.register_comm_hook(None, _mean_in_bf16)
        for p in trainable:
            p.requires_grad = True

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _mean_in_bf16(_, bucket):
    """DDP's mean of a bucket of gradients, sent as bf16. torch's bf16 hook needs nccl."""
    small = (bucket.buffer() / dist.get_world_size()).bfloat16()
    sent = dist.all_reduce(small, async_op=True).get_future()
    return sent.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def end_at_once(kind, error, trace):
    """The excepthook of a rank. It records the error for torchrun and exits at once, so that
    torchrun reports the rank that failed first. A rank that merely lost its peer waits 3 s, until
    torchrun has seen the peer fail."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(3)
    try:
        raise error.with_traceback(trace)
    except BaseException as e:
        get_error_handler().record_exception(e)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _tune_cpu():
    """Makes glibc keep freed memory, and flushes denormals. Returns glibc, or None elsewhere.

    By default glibc returns each large tensor to the OS and faults its pages in again, which makes
    a step 1.1-1.3x slower. `Runtime.sync` trims what it keeps. With denormals, logsumexp of wide
    logits and the Adam moments of unseen tokens run up to 13x slower.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
            libc.mallopt(-2, 256 << 20)  # M_TOP_PAD
            return libc


class Clock:
    """Wall time by phase, in seconds: `with clock("rollout"): ...` adds to .seconds["rollout"]."""

    def __init__(self, rt):
        self.rt = rt
        self.seconds = Counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        self.rt.wait()
        began = time.perf_counter()
        yield
        self.rt.wait()
        self.seconds[phase] += time.perf_counter() - began
