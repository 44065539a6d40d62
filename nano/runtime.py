"""Devices and ranks: everything that differs between a CPU, one GPU, many GPUs and TPUs stands in this file.

    rt = runtime.start(cfg)                   # reads cfg.device, .parallel, .tensor, .offload, .dtype, .reduce_dtype, .seed
    net = rt.wrap(model)                      # DDP, FSDP2, XLA SPMD, or the model itself; parameter names stay the same
    batch = rt.put(batch)                     # CPU tensors -> this device
    with rt.autocast(): ...
    rt.accumulate(last, net); ...; rt.backward(loss)     # gradients are summed over ranks in the last micro-batch's backward
    n = rt.all_sum(n)                         # a sum over all ranks

CPU and CUDA run one process per device (gloo, nccl). With tensor=N, N neighbouring devices share each layer and see the same rows:
`rank` and `world` count such groups, and sums over ranks count a group once. XLA runs one process per host that sees all chips as
one (SPMD): there the batch is global, `world` is 1, and what is a collective elsewhere is the identity.
The hosts of a pod slice all run the same program on the same global batch, of which each uploads what belongs on its chips, and
every number that one reads is that of all. So they must run the same graphs and fetch the same tensors, in the same order; only
writing and printing is for one.
"""

import contextlib
import ctypes
import functools
import os
import random
import resource
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

from model import ScoreHead, by_document
from nano import losses
from nano.config import UserError

SHARDED = ("fsdp", "zero2", "hsdp")
COLUMN = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
)  # each device computes some heads, or some of the ffn's units,
ROW = ("o_proj", "down_proj")  # and a summand of the result
VOCABULARY = ("embed_tokens", "lm_head")
PER_HEAD = ("q_norm", "k_norm")
TRIM = 30.0  # seconds between two trims, after which a step takes a second longer


class Replica(DistributedDataParallel):
    """A replicated model. An attribute that DistributedDataParallel does not have is the model's."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Runtime:
    """One per process. kind: cpu | cuda | xla | tpu; rank, world: of processes that see rows of their own; process, processes: of
    all; shards: parts that the batch is cut into; tensor: devices that share a layer; devices: all of them."""

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
        kind = device
        if device == "auto":
            kind = present if (present := accelerator()) in ("cuda", "tpu") else "cpu"
        self.kind, self.parallel, self.offload, self.mesh, self.net = (
            kind,
            parallel,
            offload,
            None,
            None,
        )
        self.rank = self.process = self.local_rank = 0
        self.world = self.processes = self.shards = 1
        self.local_world = 1  # processes of this node
        self.tensor, self.grid, self.group = tensor, None, None
        if tensor < 1 or tensor > 1 and offload:
            raise UserError(
                f"tensor={tensor} must be 1 or more" + ", and 1 with offload=true" * offload
            )
        if kind == "xla":
            if offload or reduce_dtype != "float32":
                raise UserError(
                    "device=xla has no offload=, and no reduce_dtype=: its gradients are summed in float32"
                )
            self._start_xla()
        elif kind in ("cpu", "cuda", "tpu"):
            self._start_processes()
        else:
            raise UserError(f"device={device}: use auto, cpu, cuda, xla or tpu")
        self.is_main = self.process == 0
        self.dtype, self.reduce_dtype = self._matrix_dtype(dtype), getattr(torch, reduce_dtype)
        self._libc, self._trimmed = _tune_cpu() if kind == "cpu" else None, time.monotonic()
        self._stop, self._stop_group, self._saving_group = False, None, None
        self.specs = {}  # on XLA: id of a parameter -> the mesh axis that cuts each of its dimensions
        self.saving = None  # waits for the training state that is being written in the background
        self.seed(seed)

    # ------------------------------------------------------------------------------------------ start

    def _start_processes(self):
        if self.kind != "cpu" and accelerator() != self.kind:
            raise UserError(
                f"device={self.kind}: this torch ({torch.__version__}) finds no such device"
            )
        if "RANK" in os.environ:
            if not {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
                raise UserError(
                    "RANK is set, but not all of WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE: start it with torchrun"
                )
            self.process, self.processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.local_rank, self.local_world = (
                int(os.environ["LOCAL_RANK"]),
                int(os.environ["LOCAL_WORLD_SIZE"]),
            )
            backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "tpu": "cpu:gloo,tpu:tpu_dist"}[
                self.kind
            ]
            if self.kind != "cpu" and self.local_world > (
                count := torch.accelerator.device_count()
            ):
                raise UserError(
                    f"{self.local_world} processes on this node share {count} devices: lower --nproc_per_node"
                )
            dist.init_process_group(backend)
            sys.excepthook = end_at_once
        if self.local_world % self.tensor:
            raise UserError(
                f"tensor={self.tensor} must divide the number of processes of a node, {self.local_world}"
            )
        self.rank, self.world = self.process // self.tensor, self.processes // self.tensor
        self.shards = self.world
        self.device = torch.device("cpu")
        if (
            self.kind != "cpu"
        ):  # device=tpu is TorchTPU's process-per-device path: written after its documentation, never run
            self.device = torch.device(self.kind, self.local_rank)
            torch.accelerator.set_device_index(self.local_rank)
        if self.processes > 1 and (self.tensor > 1 or self.parallel in SHARDED):
            copies = dict(ddp=self.world, hsdp=self.processes // self.local_world).get(
                self.parallel, 1
            )
            shape = (copies, self.world // copies, self.tensor)
            self.grid = init_device_mesh(
                self.kind, shape, mesh_dim_names=("replicate", "shard", "tensor")
            )
        if self.tensor > 1:  # sums go over one process of each tensor group
            groups = [
                dist.new_group(range(i, self.processes, self.tensor)) for i in range(self.tensor)
            ]
            self.group = groups[self.process % self.tensor]

    def _start_xla(self):
        try:
            import torch_xla
            import torch_xla.core.xla_model as xm
            import torch_xla.distributed.spmd as xs
            import torch_xla.runtime as xr
        except ImportError as e:
            raise UserError(f"device=xla needs torch_xla (see requirements-xla.txt): {e}") from None
        self.xla, self.xm, self.xs = torch_xla, xm, xs
        if (
            self.parallel not in ("ddp", "fsdp", "none")
            or self.parallel == "none"
            and self.tensor > 1
        ):
            raise UserError(
                f"parallel={self.parallel}: on device=xla use ddp, fsdp or none, with tensor= ddp or fsdp"
            )
        if self.parallel != "none":
            xr.use_spmd()  # before the first XLA tensor
        self.device = torch_xla.device()
        torch.zeros(
            1, device=self.device
        ).cpu()  # starts the client: a CPU backward before it would break every later XLA one
        self.process, self.processes = xr.process_index(), xr.process_count()
        if self.processes > 1:  # hosts of a pod slice
            if self.parallel == "none":
                raise UserError(
                    f"parallel=none uses one chip, but this slice has {self.processes} hosts: use ddp or fsdp"
                )
            import torch_xla.distributed.xla_backend  # noqa: F401  makes xla:// known, which finds the hosts' addresses

            dist.init_process_group("gloo", init_method="xla://")
        if self.parallel != "none":
            count = xr.global_runtime_device_count()
            if count % self.tensor:
                raise UserError(f"tensor={self.tensor} must divide the number of devices, {count}")
            self.shards = count // self.tensor
            self.mesh = xs.Mesh(np.arange(count), (self.shards, self.tensor), ("data", "tensor"))
            xs.set_global_mesh(self.mesh)

    def _matrix_dtype(self, name):
        if name not in ("auto", "bfloat16", "float32"):
            raise UserError(f"dtype={name}: use auto, bfloat16 or float32")
        if name != "auto":
            return getattr(torch, name)
        fast = self.kind in ("xla", "tpu")
        if self.kind == "cpu":
            fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        elif self.kind == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32

    @property
    def name(self):
        """The device's own name, where torch tells it: then the peak-FLOPs table of log.py may know it."""
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.kind

    @property
    def static_shapes(self):
        """XLA compiles a graph per shape: nothing may depend on how many target tokens a batch happens to have."""
        return self.kind == "xla"

    @property
    def devices(self):
        return self.shards * self.tensor

    @property
    def weight_shards(self):
        """Devices over which weights, gradients and moments are cut; 1 where each holds them whole."""
        if self.parallel == "hsdp":
            return self.local_world
        return self.devices if self.parallel in ("fsdp", "zero2") else self.tensor

    # ------------------------------------------------------------------------------------------ model

    def wrap(self, model, compile=False, grad_checkpoint=False):
        """Moves the model to the device and makes it parallel. Returns what to call; `model` stays the owner of the weights."""
        if self.offload and self.weight_shards == 1:
            raise UserError(
                "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts: set parallel= to one of them"
            )
        self.place(model, compile, grad_checkpoint)
        return self.replicate(model)

    def place(self, model, compile=False, grad_checkpoint=False):
        """The part of `wrap` that is done once for a model, trained or not: device, dtypes, compilation, FSDP or SPMD sharding."""
        if self.world > 1 and self.parallel == "none":
            raise UserError(f"{self.world} processes need parallel=ddp or parallel=fsdp")
        if grad_checkpoint:
            model.checkpoint = self.checkpoint
        if compile and self.kind == "xla":
            raise UserError(
                "compile=true is for cpu and cuda: device=xla compiles whole steps in any case"
            )
        losses.compiled = compile
        if compile:
            apart = torch.compiler.disable(
                by_document
            )  # lengths of documents would each be a new graph
            for layer in model.layers:
                layer.self_attn.by_document = apart
                layer.compile()
        cfg = model.cfg
        if any(n % self.tensor for n in (cfg.n_heads, cfg.n_kv_heads, cfg.ffn_dim)):
            sizes = f"{cfg.n_heads} heads, {cfg.n_kv_heads} key/value heads and {cfg.ffn_dim} units of its MLP"
            raise UserError(f"tensor={self.tensor} must divide the model's {sizes}")
        if self.tensor > 1 and self.kind != "xla":
            self._cut(model)
        if self.world > 1 and (self.tensor > 1 or self.parallel in SHARDED):
            self._shard(model)
        else:
            for module in (*model.layers, model):
                self._hold(module)
                module.to(self.device)
        if self.kind == "xla":
            self._shard_xla(model)

    def _held_in(self, module, p):
        """The dtype of a parameter: fp32 for what is trained, for adapters and score heads; the matrix work's for the rest."""
        exact = p.requires_grad or isinstance(module, (ScoreHead, nn.ParameterDict))
        return torch.float32 if exact else self.dtype

    def _hold(self, part):
        """Gives the parameters of a part of a model their dtype. Until then they may be the model's file, memory-mapped, which the
        processes of a node share; and where each part is cut at once, no process ever holds the model."""
        for module in part.modules():
            for p in module._parameters.values():
                if p is not None and p.dtype != (dtype := self._held_in(module, p)):
                    p.data = p.data.to(dtype)

    def _cut(self, model):
        """Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): parameters become DTensors over the tensor group, and each
        layer takes and gives plain tensors, of which this device has its heads or units, or all. All parameters are DTensors,
        for an optimizer's kernels take no mixture. Not by torch's parallelize_module, which knows no layers with adapters."""
        from torch.distributed.tensor import (
            Replicate,
            Shard,
            distribute_tensor,
        )  # a second that others need not wait

        mesh = self.grid["tensor"]
        for name, p in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            dim = tensor_dim(name)
            place = Replicate() if dim is None or p.shape[dim] % self.tensor else Shard(dim)
            owner = model.get_submodule(owner)
            whole = p.detach().to(self._held_in(owner, p))
            cut = distribute_tensor(
                whole, mesh, [place], src_data_rank=None
            )  # each rank has read the whole
            owner.register_parameter(key, nn.Parameter(cut, requires_grad=p.requires_grad))
        for name, module in model.named_modules():
            if module._parameters and not isinstance(
                module, nn.ParameterDict
            ):  # a dict of adapters goes with its layer
                layer = name.rpartition(".")[2]
                per_head = Shard(2) if layer in PER_HEAD else Replicate()
                inside, outside = (
                    Shard(-1) if layer in ROW else per_head,
                    Shard(-1) if layer in COLUMN else per_head,
                )
                module.register_forward_pre_hook(functools.partial(_enter, mesh, inside))
                module.register_forward_hook(functools.partial(_leave, outside))

    def _shard(self, model):
        """FSDP2, a unit for each layer and one for the rest: weights are gathered in the dtype of the matrix work, gradients are
        summed in `reduce_dtype`. fsdp gathers a layer when it is needed, zero2 keeps what the forward gathered for the backward,
        hsdp is fsdp within a node and copies over nodes; ddp with tensor= is copies alone. A layer comes to the device when it is
        cut, never the model as a whole. With offload a device's part of weights, gradients and moments stays in CPU memory, where
        the optimizer works on it."""
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        common = dict(
            mesh=self.grid["replicate", "shard"]
            if self.parallel in ("hsdp", "ddp")
            else self.grid["shard"],
            reshard_after_forward=self.parallel != "zero2",
            offload_policy=CPUOffloadPolicy(pin_memory=self.kind != "cpu")
            if self.offload
            else OffloadPolicy(),
        )
        half = MixedPrecisionPolicy(self.dtype, self.reduce_dtype)
        for layer in model.layers:
            self._hold(layer)
            fully_shard(layer, mp_policy=half, **common)
        self._hold(model)
        for module in model.modules():
            if isinstance(module, ScoreHead):  # stays fp32
                fully_shard(module, **common)
        common["reshard_after_forward"] = False  # the head's weight is used after the forward
        fully_shard(model, mp_policy=half, **common)

    def replicate(self, model, params=None):
        """The part of `wrap` that ties gradients together: what to call for a forward whose backward meets over ranks.
        params {name: p}: those that this net trains, where several nets share one model's trunk (None: all trainable ones)."""
        if self.world == 1 or self.parallel != "ddp" or self.tensor > 1:
            return model
        trainable = [p for p in model.parameters() if p.requires_grad]
        mine = {id(p) for p in (trainable if params is None else params.values())}
        for p in trainable:
            p.requires_grad = id(p) in mine
        ids = [self.local_rank] if self.kind == "cuda" else None
        net = Replica(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.reduce_dtype == torch.bfloat16:
            net.register_comm_hook(None, _mean_in_bf16)
        for p in trainable:
            p.requires_grad = True
        return net

    def reshard(self, net):
        """FSDP keeps the embedding and the head whole after a forward, until a backward has used them, and named_parameters() then
        gives these copies: to be called after a forward without one, before an optimizer is built or a state is loaded."""
        if hasattr(net, "reshard"):
            net.reshard()

    def _shard_xla(self, model):
        if self.mesh is not None:
            for name, p in model.named_parameters():
                if self.parallel == "fsdp" or self.tensor > 1:
                    self.specs[id(p)] = self._shard_spec(name, p)
                    self.xs.mark_sharding(p, self.mesh, self.specs[id(p)])
            for layer in model.layers:  # keeps the activations cut along the batch
                layer.register_forward_hook(
                    lambda module, args, out: (self._mark_batch(out), None)[1]
                )
        self.sync()

    def _shard_spec(self, name, p):
        """By axis: tensor as tensor_dim says, but for the vocabulary, or else sampled tokens come in parts, and to fetch these is
        compiled anew each time; fsdp the largest dimension left that the devices divide, of matrices."""
        spec, cut = (
            [None] * p.dim(),
            None if name.split(".")[-2] in VOCABULARY else tensor_dim(name),
        )
        if cut is not None and self.tensor > 1 and p.shape[cut] % self.tensor == 0:
            spec[cut] = "tensor"
        dims = (
            [d for d in range(p.dim()) if spec[d] is None and p.shape[d] % self.shards == 0]
            if p.dim() > 1
            else []
        )
        if dims and self.parallel == "fsdp":
            spec[max(dims, key=lambda d: p.shape[d])] = "data"
        return tuple(spec)

    def _mark_batch(self, t):
        if (
            self.mesh is not None and t.shape[0] % self.shards == 0
        ):  # XLA fails on some uneven cuts: a few samples stay whole
            self.xs.mark_sharding(t, self.mesh, ("data",) + (None,) * (t.dim() - 1))
        return t

    def checkpoint(self, layer, *inputs):
        """Runs a layer so that its activations are computed again in the backward pass instead of kept."""
        if self.kind == "xla":
            from torch_xla.utils.checkpoint import (
                checkpoint,
            )  # given a bound method, it puts the weights behind the barrier too

            x, *rest = (
                inputs  # frozen embeddings: without an input that needs a gradient no adapter would get one
            )
            return checkpoint(
                layer.forward,
                x if x.requires_grad else x.detach().requires_grad_(),
                *rest,
                use_reentrant=True,
            )
        return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)

    # ------------------------------------------------------------------------------------------ step

    def put(self, batch):
        """dict of CPU tensors (B, ...) -> on the device, cut along B under SPMD. What is no tensor stays."""
        pin = self.kind == "cuda"

        def move(t):
            if not torch.is_tensor(t):
                return t
            t = (t.pin_memory() if pin else t).to(self.device, non_blocking=pin)
            return self._mark_batch(t) if t.dim() > 1 else t

        return {k: move(t) for k, t in batch.items()}

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def accumulate(self, last, *nets):
        """To be called before the forward of a micro-batch: under DDP the ranks' gradients meet in the backward of the `last` one
        only. Sharded gradients meet every time: to keep them whole until then would take the memory that sharding saves."""
        for net in nets:
            if isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = last

    def backward(self, loss):
        """Adds the gradient of `loss`, this rank's part of the global sum."""
        (
            loss * self.world
        ).backward()  # DDP and FSDP average over ranks; the losses are parts of one sum
        self.sync()

    def all_sum(self, x):
        """Sum of a tensor, or of a number, over all ranks (of which a tensor group is one)."""
        if self.world == 1:
            return x
        t = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
        dist.all_reduce(t, group=self.group)
        return t if torch.is_tensor(x) else t.item()

    def sync(self):
        """After each backward and step: XLA runs what was recorded so far. On a CPU the kernel gets back, twice a minute, what
        lies free between blocks: rows whose lengths change leave gaps there, and memory would grow by 1% a step."""
        if self.kind == "xla":
            state = self.xm.get_rng_state()
            self.xla.sync()
            if not torch.is_grad_enabled():  # each sync moves XLA's generator: but an evaluation, which a resume repeats, must not
                self.xm.set_rng_state(state)
        elif self._libc and time.monotonic() - self._trimmed > TRIM:
            self._libc.malloc_trim(0)
            self._trimmed = time.monotonic()

    def wait(self):
        """Until the device has done everything: for timing."""
        if self.kind == "xla":
            self.xla.sync(wait=True)
        elif self.kind != "cpu":
            torch.accelerator.synchronize()

    def once(self, f, *args):
        """f(*args); on a pod slice that of its first host for all: for what the state of the run does not decide, such as which
        files there are or what a user's function says. Hosts that go different ways wait for each other for ever."""
        if self.kind != "xla" or self.processes == 1:
            return f(*args)
        box = [None, None]
        if self.is_main:
            try:
                box[0] = f(*args)
            except UserError as e:  # ends all of them
                box[1] = e
        dist.broadcast_object_list(box)
        if box[1]:
            raise box[1]
        return box[0]

    def barrier(self):
        if self.processes > 1:
            dist.barrier()

    def prime(self, optimizer):
        """On XLA: creates Adam's moments before step 1, so that step 1 and step 2 are one graph, sharded like their parameters."""
        if self.kind != "xla":
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if not optimizer.state[p]:
                    moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    optimizer.state[p] = dict(step=torch.tensor(0.0), **moments)
                if id(p) in self.specs:
                    for t in (
                        p,
                        optimizer.state[p]["exp_avg"],
                        optimizer.state[p]["exp_avg_sq"],
                    ):  # what a state was loaded into
                        self.xs.mark_sharding(t, self.mesh, self.specs[id(p)])
        self.sync()

    def compiles(self):
        """On XLA {"graphs": how many were compiled so far}, for the log: it must stop growing. Elsewhere {}."""
        if self.kind != "xla":
            return {}
        from torch_xla.debug.metrics import metric_data

        return {"graphs": (metric_data("CompileTime") or (0,))[0]}

    # ------------------------------------------------------------------------------------------ state

    def seed(self, seed):
        """Ranks share the seed: what differs between them (their rows) never comes from the global generators."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        if self.kind == "xla":
            self.xla.manual_seed(seed)

    def rng_state(self):
        """The generators' states as tensors, a row for each process: dropout leaves them different. A collective."""
        state = dict(cpu=torch.get_rng_state())
        if self.kind == "xla":
            state["xla"] = torch.tensor(
                divmod(self.xm.get_rng_state(), 2**32)
            )  # it has 64 bits and no sign
        elif self.kind != "cpu":
            state[self.kind] = torch.get_device_module(self.device).get_rng_state(self.device)
        if self.processes == 1:
            return {name: t[None] for name, t in state.items()}
        rows = {
            name: [torch.empty_like(t) for _ in range(self.processes)] for name, t in state.items()
        }
        for name, t in state.items():
            dist.all_gather(rows[name], t)
        return {name: torch.stack(ts) for name, ts in rows.items()}

    def set_rng_state(self, state):
        """To what rng_state gave. Another number of processes than then draws other numbers anyway, and takes the first one's; the
        generator of another kind of device is left out."""
        state = {
            name: t[self.process if len(t) == self.processes else 0].clone()
            for name, t in state.items()
        }
        torch.set_rng_state(state["cpu"])
        if self.kind == "cpu" or self.kind not in state:
            return
        if self.kind == "xla":
            high, low = state["xla"].tolist()
            self.xm.set_rng_state(high * 2**32 + low)
        else:
            torch.get_device_module(self.device).set_rng_state(state[self.kind], self.device)

    def host(self, t):
        """The tensor on the CPU, without a gradient."""
        t = t.detach()
        if self.mesh is not None and t.device.type == "xla" and t.is_floating_point() and t.dim():
            t = (
                t * 1
            )  # gathered in a graph of its shape: by itself XLA compiles the gathering anew each time
            self.xs.mark_sharding(t, self.mesh, (None,) * t.dim())
        return t.cpu()

    def full(self, tensors):
        """{name: tensor} -> the same on the CPU, whole, for the main process. A collective under FSDP and SPMD: every process calls
        it, with the same names."""
        out = {}
        for name, t in tensors.items():
            t = t.full_tensor() if hasattr(t, "full_tensor") else t
            if self.is_main or self.mesh is not None:
                t = self.host(t).contiguous()
            if self.is_main:
                out[name] = t
        return out

    def saving_group(self):
        """All processes as a group of their own for what saves and loads: it may be at work while the training goes on."""
        if self.processes > 1 and self._saving_group is None:
            self._saving_group = dist.new_group(backend="gloo")
        return self._saving_group

    def finish_saving(self):
        if self.saving:
            self.saving()
        self.saving = None

    def peak_memory(self):
        """Peak bytes: of the device on CUDA, of the process elsewhere."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

    # ------------------------------------------------------------------------------------------ stop

    def catch_signals(self):
        """SIGTERM and Ctrl-C ask the loop to stop after its step (`should_stop`); the second one ends the process at once."""

        def handler(number, frame):
            self._stop = True
            signal.signal(
                number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
            )
            if self.is_main:
                print(
                    f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)",
                    flush=True,
                )

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)
        if self.processes > 1 and self._stop_group is None:
            self._stop_group = dist.new_group(
                backend="gloo"
            )  # a flag on the CPU: asking costs no device sync

    def should_stop(self):
        """True on every rank as soon as one was asked to stop."""
        if self.processes == 1:
            return self._stop
        flag = torch.tensor(int(self._stop))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._stop_group)
        return bool(flag)

    def close(self):
        self.finish_saving()
        if dist.is_initialized():
            dist.destroy_process_group()


def _enter(mesh, place, module, inputs):
    from torch.distributed.tensor import DTensor

    return tuple(DTensor.from_local(x, mesh, [place], run_check=False) for x in inputs)


def _leave(place, module, inputs, output):
    return output.redistribute(placements=[place]).to_local()


def tensor_dim(name):
    """The dimension along which the devices of a tensor group cut the parameter of this name; None: each has it whole."""
    words = name.split(".")
    layer, kind = (
        words[-3:-1] if words[-2].startswith("lora_") else words[-2:]
    )  # an adapter's name comes last
    if layer in COLUMN:
        return None if kind == "lora_A" else 0
    if layer in ROW:
        return 1 if kind in ("weight", "lora_A") else None
    return 0 if layer in VOCABULARY else None


def end_at_once(kind, error, trace):
    """What an exception does to a rank, so that torchrun's report names the one that failed first, and why: the process ends
    without the goodbyes that take a second, and one that has only lost another waits until that one's end has been noticed."""
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


def accelerator():
    """The type of the device that torch finds beside the CPU, or None."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


def _tune_cpu():
    """glibc gives every large tensor back to the kernel and faults it in again; keeping it is 1.1-1.3x faster (`sync` trims it).
    Denormals off: logsumexp of wide logits and Adam moments of unseen tokens run up to 13x slower with them. -> glibc or None."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            for option, value in (
                (-4, 0),
                (-1, -1),
                (-2, 256 << 20),
            ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                libc.mallopt(option, value)
            return libc


def start(cfg):
    """The process's Runtime, from the keys device=, parallel=, tensor=, offload=, dtype=, reduce_dtype= and seed=."""
    return Runtime(
        cfg.device, cfg.parallel, cfg.dtype, cfg.seed, cfg.offload, cfg.tensor, cfg.reduce_dtype
    )


def _mean_in_bf16(_, bucket):
    """DDP's mean of a bucket of gradients, sent as bf16. torch's own hook of this kind is for nccl alone."""
    small = (bucket.buffer() / dist.get_world_size()).bfloat16()
    sent = dist.all_reduce(small, async_op=True).get_future()
    return sent.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class Clock:
    """Wall time by phase: with clock("rollout"): ...; .seconds holds the sums."""

    def __init__(self, rt):
        self.rt, self.seconds = rt, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        self.rt.wait()
        began = time.perf_counter()
        yield
        self.rt.wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
