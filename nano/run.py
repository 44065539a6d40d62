"""The book-keeping of a run: its folder, log, resume, saved models and state, stop and end message.

    run = Run("sft", cfg, rt)                                    # refuses a folder that will not do
    run.identify(model.named_parameters(), data.fingerprint())   # refuses a resume on other data
    run.attach(model, trained, {"adamw": optimizer}, tok, base)  # on a resume, loads the state
    steps = run.total_steps(train.steps_per_epoch)
    for step in run.steps():
        with run.paused():
            if val and run.due(cfg.eval_every):
                run.evaluated(evaluate(rt, net, val), keep="loss")      # logs; saves best/
            if run.due(cfg.save_every) or run.ending:
                run.save()                                              # last/ and state/
        if run.ending:
            break
        ...                                                             # one optimizer step
        if run.logs:
            run.log_step(loss=rt.all_sum(loss), grad_norm=norm, lr=lr)
    return run.close()                                                  # "done", or "SIGTERM" ...

The stage calls Run, and Run never calls the stage. It takes no function and knows no loss.
"""

import contextlib
import hashlib
import math
import os
import shutil
import signal
import socket
from pathlib import Path

import torch

from nano import adapters, config, files, optim, runtime, state, weights
from nano.config import UserError
from nano.log import Log, check_tracker

SOURCES = ("model", "reward", "policy", "tokenizer")  # keys that name what a run starts from
# and those that change what it is made from
SHAPING = (*SOURCES, "base", "quant", "double_quant", "data", "sizes", "weights")


class Run:
    """The book-keeping of one process. Every rank makes the same calls, and the main one writes.

    out: the run folder.
    resumes: whether the folder holds a state from which this run continues.
    start: the steps done before.
    best: the lowest value by which `evaluated` kept best/, or less the highest one.
    meta: the stage's JSON values that a resume needs. tensors: its tensors that a resume needs.
    model_keys: what the stage wants to be written beside the model's configuration, such as the
    scale of a reward model's scores.
    """

    def __init__(self, stage, cfg, rt):
        config.check(cfg)  # here too, because a notebook calls main(cfg) itself
        self.stage = stage
        self.cfg = cfg
        self.rt = rt
        self.out = Path(cfg.out)
        self.start = self.step = 0
        self.best = math.inf
        self.evaluations = [0, 0]  # the step of the last one, and how many since best/ was saved
        self.skips = {}  # {optimizer: its skipped steps that were reported}
        self.meta = {}
        self.tensors = {}
        self.model_keys = {}
        self.average = None
        self.averaged = False  # whether the average is in the parameters' place
        self.tokens = self.targets = 0  # of this rank since the last line of the log
        self.stopped = self.exhausted = False
        check_tracker(getattr(cfg, "track", ""))  # before anything is removed
        check_sources(cfg, self.out)
        state.check_place(self.out)
        rt.once(lock, self.out, rt)
        self.resumes = state.resumes(self.out, cfg.resume, rt)
        runtime.catch_signals(rt)

    def saved_meta(self):
        """What the stage kept in run.meta when the state was saved, before anything is loaded."""
        return self.rt.once(files.read_json, self.out / "state" / "state.json").get("meta", {})

    def identify(self, params, data, validation=None):
        """Says what the run is made from -> the fingerprints of it, {"model", "data",
        "validation"}.

        params: [(name, parameter)] of the models that it starts from, on the CPU. data, validation:
        fingerprints of the data. UserError where the state in the folder comes from another model
        or other data, unless resume=anyway, and where the ranks do not see the same data."""
        rt = self.rt
        model = model_of_all(rt, params, data, validation)
        self.made_from = dict(model=model, data=data, validation=validation)
        if not self.resumes:
            return self.made_from
        meta = self.saved_meta()
        saved = meta.get("made_from")
        if saved is None:
            tell(
                rt,
                f"note: {self.out}/state does not say what it was made from: the model and "
                "the data of this command are assumed",
            )
            return self.made_from
        names = dict(model="another model", data="other data", validation="other validation data")
        other = " and ".join(names[key] for key in names if saved.get(key) != self.made_from[key])
        if other and self.cfg.resume != "anyway":
            changes = config.changes(self.cfg, meta.get("config") or "")
            changes = [change for change in changes if change.split(" ")[0] in SHAPING]
            changed = f" ({', '.join(changes)})" if changes else ""
            raise UserError(
                f"{self.out}/state was made from {other}{changed}: give the run's own, start anew "
                "with resume=false, or go on all the same with resume=anyway"
            )
        if other:
            tell(rt, f"note: the run goes on from {other} than before")
        return self.made_from

    def attach(self, model, trained, optimizers, tok, base, adapter=None):
        """Says what the run trains and saves, loads the state on a resume, and opens the log.

        model: the module that owns the weights.
        trained: {name: parameter}. optimizers: {name: optimizer}.
        tok, base: the tokenizer, and the directory that it and the configuration come from.
        adapter: the name of the adapter to save. None: the whole model is saved.
        """
        self.model = model
        self.trained = trained
        self.optimizers = optimizers
        self.tok = tok
        self.base = base
        self.adapter = adapter
        self.measure = measure_of(self.cfg)
        for optimizer in optimizers.values():
            optimizer.skips = torch.zeros(3, device=self.rt.device)
        if decay := getattr(self.cfg, "ema", 0.0):
            (optimizer,) = optimizers.values()
            self.average = optimizer.average = optim.Average(trained, decay)
        old, note = "", ""
        if self.resumes:
            old = self.load()
        elif self.rt.is_main and (self.cfg.steps or getattr(self.cfg, "epochs", 0)):
            note = clear(self.out)
        self.log = Log(self.out, self.rt, self.start, getattr(self.cfg, "track", ""))
        self.rt.cleanup.callback(self.log.close)
        self.log.settings(self.stage, self.cfg, old)
        if note:
            self.log.text(note)

    def load(self):
        """Loads the state of the run -> the settings with which it was saved, as a .cfg text."""
        meta, self.tensors = state.load_training(
            self.out / "state", self.rt, self.stage, self.trained, self.optimizers
        )
        self.start = self.step = meta.pop("step")
        best, evaluations = meta.pop("best", math.inf), meta.pop("evaluations", self.evaluations)
        made_from = meta.pop("made_from", self.made_from)
        kept_by = meta.pop("keep", "")
        same = made_from["validation"] == self.made_from["validation"]
        if same and kept_by == self.measure:
            # of other data, or of another measure, they would mean nothing
            self.best, self.evaluations = best, evaluations
        for name, skips in meta.pop("skips", {}).items():
            self.optimizers[name].skips = torch.tensor(skips, device=self.rt.device)
            self.skips[name] = skips[0]
        old = meta.pop("config", None)
        if old is None and (self.out / "config.cfg").exists():  # a state of the first edition
            old = files.read_text(self.out / "config.cfg")
        self.meta |= meta
        if self.average:
            self.average.begin(self.start)  # where the state has none, it begins here
        for name in [name for name in self.tensors if name.startswith("average.")]:
            value = self.tensors.pop(name)
            if self.average:
                self.average.values[name.removeprefix("average.")].copy_(value)
        return old or ""

    # ---- the loop

    def total_steps(self, steps_per_epoch):
        """The number of optimizer steps: steps=, or else epochs= times `steps_per_epoch`."""
        self.epoch = steps_per_epoch
        epochs = getattr(self.cfg, "epochs", 0)
        self.total = self.cfg.steps or max(round(epochs * steps_per_epoch), int(epochs > 0))
        if 0 < self.total <= self.cfg.warmup_steps:
            raise UserError(
                f"warmup_steps={self.cfg.warmup_steps} takes all {self.total} steps of the run, "
                f"which would never reach lr={self.cfg.lr}: lower it"
            )
        return self.total

    def steps(self, flops_per_token=0.0):
        """Yields the number of each step from the start to the last one, and then the total.

        Step `total` trains nothing. It is there to evaluate and save what the last step left."""
        self.log.begin(self.total, flops_per_token)
        self.model.train()
        for step in range(self.start, self.total + 1):
            self.step = step
            self.poll()
            yield step

    def poll(self):
        """True on every rank as soon as one of them was asked to stop (SIGTERM, Ctrl-C)."""
        self.stopped = self.rt.should_stop()
        return self.stopped

    @property
    def ending(self):
        """All steps are done, the run was asked to stop, or `patience` is exhausted: save and leave
        the loop."""
        return self.stopped or self.exhausted or self.step == self.total

    def due(self, every):
        """Whether what happens every `every` steps is due now. 0: once an epoch. -1: never."""
        if self.stopped or every == -1:
            return False
        return self.step % (every or self.epoch) == 0 or self.step == self.total

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count in the tokens per second: evaluation, saving.

        With ema= the average stands in the parameters' place, if anything is due."""
        keys = ("eval_every", "sample_every", "save_every")
        due = self.ending or any(self.due(getattr(self.cfg, key, -1)) for key in keys)
        with self.log.paused():
            if not due or not self.average:
                yield
                return
            with self.average.swapped():
                self.averaged = True
                yield
                self.averaged = False

    # ---- what a run says and keeps

    def describe(self, data):
        """Says what the run trains on (`data`), how long, and on which devices."""
        rt = self.rt
        self.log.text(
            f"{data}; {self.epoch} steps an epoch, {self.total} in all from step {self.start}; "
            f"{rt.devices} x {rt.name}, {rt.dtype}"
        )

    def count(self, micro_batch):
        """Counts a micro-batch's tokens for the next line of the log."""
        self.tokens += micro_batch["n_tokens"]
        self.targets += micro_batch["n_targets"]

    @property
    def logs(self):
        """Whether the step that was just made gets a line. log_every=0: the last step only."""
        done = self.step + 1
        return done % (self.cfg.log_every or self.total) == 0 or done == self.total

    def log_step(self, **metrics):
        """The line of the step that was just made. The device is read here and nowhere else."""
        tokens, targets = map(self.rt.all_sum, (self.tokens, self.targets))
        metrics |= self.rt.compiles()
        if skipped := sum(o.skips[0].item() for o in self.optimizers.values()):
            metrics["skipped"] = int(skipped)  # since the run began
        self.log.step(self.step + 1, tokens, targets, self.rt.peak_memory(), **metrics)
        self.tokens = self.targets = 0
        self.report_skips(self.step + 1)

    def report_skips(self, step):
        """Says which steps were skipped since the last report, because their gradient was not
        finite. UserError if bad_steps= were skipped in a row."""
        for name, optimizer in self.optimizers.items():
            total, row, longest = map(int, optimizer.skips.tolist())
            new = total - int(self.skips.get(name, 0))
            self.skips[name] = total
            which = f" of the {name} optimizer" if len(self.optimizers) > 1 else ""
            if new:
                self.log.text(
                    f"warning at step {step}: {new} {'step' if new == 1 else 'steps'}{which} "
                    "skipped since the last such line, because the gradient held NaN or infinity"
                )
            if 0 < self.cfg.bad_steps <= longest:
                self.rt.finish_saving()
                raise bad_steps_error(f"the gradient{which}", longest, step, self.out)

    def evaluated(self, metrics, keep):
        """Logs an evaluation. Saves the model as best/ if metrics[keep] is the best so far.

        The lowest is the best, but of a task's metric (TASK/METRIC) it is the highest. Without
        metrics[keep] there is no best. After patience= evaluations without a better one the run
        ends."""
        self.log.eval(self.step, **metrics)
        last, without = self.evaluations
        if not self.step or keep not in metrics:
            return
        value = -metrics[keep] if "/" in keep else metrics[keep]
        if value < self.best:
            self.best = value
            self.evaluations = [self.step, 0]
            self.save_model(self.out / "best")
        elif self.step != last:  # a resume repeats the evaluation at which it was saved
            self.evaluations = [self.step, without + 1]
        patience = getattr(self.cfg, "patience", 0)
        if 0 < patience <= self.evaluations[1] and self.step < self.total:
            self.exhausted = True
            self.log.text(
                f"no better {keep} in {self.evaluations[1]} evaluations (patience=): the run ends "
                f"at step {self.step}, and {self.out}/best is the best"
            )

    def save(self):
        """Saves last/ and state/, and step-N/ with keep_last=, unless this run has not made a step
        yet."""
        if self.step == self.start:
            return
        self.report_skips(self.step)
        self.save_model(self.out / "last")
        if self.cfg.keep_last and self.rt.is_main:
            keep_steps(self.out, self.step, self.cfg.keep_last)
        tensors = dict(self.tensors)
        if self.average:
            tensors |= {f"average.{name}": t for name, t in self.average.values.items()}
        meta = dict(
            step=self.step,
            best=self.best,
            made_from=self.made_from,
            evaluations=self.evaluations,
            keep=self.measure,
            skips={name: o.skips.tolist() for name, o in self.optimizers.items()},
            config=settings_text(self.cfg),
        )
        # the state holds the parameters themselves, and the average beside them
        with self.average.swapped() if self.averaged else contextlib.nullcontext():
            state.save_training(
                self.out / "state",
                self.rt,
                self.stage,
                self.trained,
                self.optimizers,
                tensors,
                **self.meta | meta,
            )

    def save_model(self, dir):
        """Writes the model, or its adapter, to `dir`. All ranks gather the weights, one writes."""
        tensors = dict(self.model.named_parameters())
        if self.adapter:  # by identity, because `trained` may have other names for them
            ids = {id(p) for p in self.trained.values()}
            tensors = {name: p for name, p in tensors.items() if id(p) in ids}
        tensors = self.rt.gather(tensors)
        if not self.rt.is_main:
            return
        with files.new_dir(dir) as tmp:
            if self.adapter:
                weights.save_adapter(self.model, tmp, self.adapter, self.base, tensors, self.tok)
                if self.model_keys:
                    files.write_json(tmp / "score_scale.json", self.model_keys)
            else:
                dtype, keys = self.rt.dtype, self.model_keys
                weights.save_model(self.model, tmp, dtype, self.base, tensors, tok=self.tok, **keys)

    def close(self):
        """Says how the run ended, and closes the log and the process group.

        Returns what main is to return: "done", or the name of the signal that stopped the run."""
        if self.stopped:
            self.log.text(
                f"stopped at step {self.step}: the same command continues from here, "
                "unless it says resume=false"
            )
        elif self.resumes and self.start >= self.total:
            self.log.text(
                f"{self.out} is at step {self.start} already: raise steps= or epochs= to go on, "
                "or start anew with resume=false"
            )
        self.log.close()
        self.rt.close()
        number = self.rt.signal or signal.SIGTERM
        return signal.Signals(number).name if self.stopped else "done"


# ---- the run folder


def folders(out):
    """The folders that a run writes, or removes when it starts anew."""
    names = [out / name for name in ("state", "best", "last")]
    return [*names, *kept_steps(out)]


def kept_steps(out):
    """The folders step-N of a run, in the order of N. Others of such names are the user's own."""
    dirs = [dir for dir in out.glob("step-*") if dir.name.removeprefix("step-").isdecimal()]
    return sorted(dirs, key=lambda dir: int(dir.name.removeprefix("step-")))


def check_sources(cfg, out):
    """UserError where the run would write into or over what it starts from, or over the base of an
    adapter that it starts from."""
    for key in SOURCES:
        value = getattr(cfg, key, "")
        for source in value if isinstance(value, tuple) else [value]:
            if source and ".py:" not in source and Path(source).exists():
                named = getattr(cfg, "base", None)
                base = adapters.is_adapter(source) and adapters.find_base(source, named)
                if out.resolve() == Path(source).resolve():
                    raise UserError(f"out={out} is the model's own directory: give another out=")
                files.refuse_overwrite(folders(out), [source, base])


def lock(out, rt):
    """Takes the run folder for this process. The lock dies with it, however it ends.

    UserError on all ranks if another run is at work in the folder."""
    new = [dir for dir in (out, *out.parents) if not dir.exists()]
    path = out / "lock"
    fd = owner = None
    if rt.is_main:
        out.mkdir(parents=True, exist_ok=True)
        fd = files.lock(path)
        owner = "" if fd else files.read_text(path).strip()
    if rt.all_sum(int(owner is not None and fd is None)):
        by = f" ({owner})" if owner else ""
        raise UserError(
            f"another process{by} is at work in {out}: wait for it, or give another out=. "
            "If it was to be one run of several processes, start it with torchrun, because "
            "`srun -n 2 python sft.py` starts two runs"
        )
    if not fd:
        return
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release():
        path.unlink(missing_ok=True)
        os.close(fd)
        with contextlib.suppress(OSError):  # what a run that wrote nothing has created
            for dir in new:
                dir.rmdir()

    rt.cleanup.callback(release)


def clear(out):
    """Removes what an earlier run left in the folder -> a sentence, or "".

    The state goes first. So a kill here leaves nothing that a run could continue from, and
    whatever stands in the folder later belongs to one run. The log, by which the folder is
    known to be a run's, is written anew behind this."""
    if not (out / "log.jsonl").exists():
        return ""
    removed = []
    for dir in folders(out):
        files.recover_dir(dir)
        if dir.exists():
            files.remove_dir(dir)
            removed.append(f"{dir.name}/")
    for path in out.glob("events.out.tfevents.*"):
        path.unlink()
    listed = f" ({', '.join(removed)})" if removed else ""
    return f"note: the run starts anew and has removed what {out} held of another{listed}"


def bad_steps_error(gradient, row, step, out):
    """The UserError that ends a run after `row` skipped steps."""
    last = "nothing is saved"
    if (out / "state").exists():
        last = f"{out}/state is the last good state"
    return UserError(
        f"{gradient} held NaN or infinity in {row} steps in a row (bad_steps=) up to step {step}: "
        f"lower lr=, set grad_clip=1, or look for rows that make the loss infinite; {last}"
    )


def keep_steps(out, step, count):
    """Keeps last/ as step-N/ too, and the newest `count` of such folders."""

    def link(source, target):  # the next save replaces last/ and not its files
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)

    with files.new_dir(out / f"step-{step}") as tmp:
        shutil.copytree(out / "last", tmp, copy_function=link, dirs_exist_ok=True)
    for old in kept_steps(out)[:-count]:
        files.remove_dir(old)


def settings_text(cfg):
    """The settings of a run as a .cfg text, for the state.

    Without out=, because a folder may be moved, and without resume=."""
    pairs = config.texts(cfg).items()
    return "".join(f"{key}={text}\n" for key, text in pairs if key not in ("out", "resume"))


def measure_of(cfg):
    """The settings that decide what keep= measures, as text. "" where best/ has the lowest loss.

    The content of local files counts too, since they may change under the same name."""
    if not getattr(cfg, "keep", ""):
        return ""
    names = ("keep", "eval_tasks", "eval_shots", "eval_files", "eval_shot_files", "eval_limit")
    pairs = config.texts(cfg)
    paths = [path for path in (*cfg.eval_files, *cfg.eval_shot_files) if path]
    return "".join(f"{name}={pairs[name]}\n" for name in names) + " ".join(
        files.fingerprint(path) for path in paths
    )


def model_of_all(rt, params, data, validation):
    """The fingerprint of the models' parameters, on all ranks. UserError where they do not have the
    same fingerprints of the data."""
    number = int(hashlib.sha256(f"{data} {validation}".encode()).hexdigest()[:8], 16)
    if rt.all_sum(float(rt.all_sum(float(number)) != rt.world * number)):
        raise UserError(
            "the ranks read different data: put data= on a file system that all nodes see, "
            "or copy the same folders to each"
        )
    # one rank reads the weights and tells the others, in two numbers that a sum keeps exact
    model = weights.fingerprint(params) if rt.rank == 0 else "0" * 16
    halves = [rt.all_sum(float(int(model[i : i + 8], 16))) for i in (0, 8)]
    return "".join(f"{int(half):08x}" for half in halves)


def refuse_validation(cfg, *keys):
    """UserError for those of the keys that were given, where the data have no validation split.

    -1 asks for nothing, and tasks can be measured without one."""
    tasks = {"eval_every"} if getattr(cfg, "eval_tasks", ()) else set()
    tasks |= {"patience"} if getattr(cfg, "keep", "") else set()
    for key in (key for key in keys if getattr(cfg, key) != -1 and key not in tasks):
        config.refuse(cfg, key, "without a validation split", "the data: prepare with val=")


def tell(rt, text):
    """Prints a line before the log is open."""
    if rt.is_main:
        print(text, flush=True)
