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
    run.close()

The stage calls Run, and Run never calls the stage. It takes no function and knows no loss.
"""

import hashlib
import math
from pathlib import Path

from nano import config, files, state, weights
from nano.config import UserError
from nano.log import Log

SOURCES = ("model", "reward", "policy")  # the keys that name a model from which a run starts


class Run:
    """The book-keeping of one process. Every rank makes the same calls, and the main one writes.

    out: the run folder.
    resumes: whether the folder holds a state from which this run continues.
    start: the steps done before.
    best: the lowest value by which `evaluated` kept best/.
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
        self.meta = {}
        self.tensors = {}
        self.model_keys = {}
        self.tokens = self.targets = 0  # of this rank since the last line of the log
        self.stopped = False
        sources = [getattr(cfg, key, "") for key in SOURCES]
        self.resumes = state.resumes(self.out, cfg.resume, rt, *sources)
        rt.catch_signals()

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
        number = int(hashlib.sha256(f"{data} {validation}".encode()).hexdigest()[:8], 16)
        if rt.all_sum(float(rt.all_sum(float(number)) != rt.world * number)):
            raise UserError(
                "the ranks read different data: put data= on a file system that all nodes see, "
                "or copy the same folders to each"
            )
        # one rank reads the weights and tells the others, in two numbers that a sum keeps exact
        model = weights.fingerprint(params) if rt.rank == 0 else "0" * 16
        halves = [rt.all_sum(float(int(model[i : i + 8], 16))) for i in (0, 8)]
        model = "".join(f"{int(half):08x}" for half in halves)
        self.made_from = dict(model=model, data=data, validation=validation)
        if not self.resumes:
            return self.made_from
        saved = self.saved_meta().get("made_from")
        if saved is None:
            self.tell(
                f"note: {self.out}/state does not say what it was made from: the model and "
                "the data of this command are assumed"
            )
            return self.made_from
        names = dict(model="another model", data="other data", validation="other validation data")
        other = " and ".join(names[key] for key in names if saved[key] != self.made_from[key])
        if other and self.cfg.resume != "anyway":
            raise UserError(
                f"{self.out}/state was made from {other}: give the run's own, start anew with "
                "resume=false, or go on all the same with resume=anyway"
            )
        if other:
            self.tell(f"note: the run goes on from {other} than before")
        return self.made_from

    def tell(self, text):
        """Prints a line before the log is open."""
        if self.rt.is_main:
            print(text, flush=True)

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
        if self.resumes:
            meta, self.tensors = state.load_training(
                self.out / "state", self.rt, self.stage, trained, optimizers
            )
            self.start = self.step = meta.pop("step")
            best = meta.pop("best", math.inf)
            made_from = meta.pop("made_from", self.made_from)
            if made_from["validation"] == self.made_from["validation"]:
                self.best = best  # of other data it would mean nothing
            self.meta |= meta
        self.log = Log(self.out, self.rt, self.start)
        self.log.settings(self.stage, self.cfg, self.resumes)

    # ---- the loop

    def refuse_validation(self, *keys):
        """UserError for those of the keys that were given, where the data have no validation
        split. -1 asks for nothing."""
        for key in (key for key in keys if getattr(self.cfg, key) != -1):
            config.refuse(
                self.cfg, key, "without a validation split", "the data: prepare with val="
            )

    def total_steps(self, steps_per_epoch):
        """The number of optimizer steps: steps=, or else epochs= times `steps_per_epoch`."""
        self.epoch = steps_per_epoch
        epochs = getattr(self.cfg, "epochs", 0)
        self.total = self.cfg.steps or max(round(epochs * steps_per_epoch), int(epochs > 0))
        if 0 < self.total < self.cfg.warmup_steps:
            raise UserError(
                f"warmup_steps={self.cfg.warmup_steps} is above the {self.total} steps of the run, "
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
        """The run was asked to stop, or all steps are done: save and leave the loop."""
        return self.stopped or self.step == self.total

    def due(self, every):
        """Whether what happens every `every` steps is due now. 0: once an epoch. -1: never."""
        if self.stopped or every == -1:
            return False
        return self.step % (every or self.epoch) == 0 or self.step == self.total

    def paused(self):
        """A context whose time does not count in the tokens per second: evaluation, saving."""
        return self.log.paused()

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
        self.log.step(self.step + 1, tokens, targets, self.rt.peak_memory(), **metrics)
        self.tokens = self.targets = 0

    def evaluated(self, metrics, keep):
        """Logs an evaluation. Saves the model as best/ if metrics[keep] is the lowest so far."""
        self.log.eval(self.step, **metrics)
        if self.step and metrics[keep] < self.best:
            self.best = metrics[keep]
            self.save_model(self.out / "best")

    def save(self):
        """Saves last/ and state/, unless this run has not made a step yet."""
        if self.step == self.start:
            return
        self.save_model(self.out / "last")
        state.save_training(
            self.out / "state",
            self.rt,
            self.stage,
            self.trained,
            self.optimizers,
            self.tensors,
            **self.meta | dict(step=self.step, best=self.best, made_from=self.made_from),
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
        if self.adapter:
            weights.save_adapter(self.model, dir, self.adapter, self.base, tensors, self.tok)
            if self.model_keys:
                files.write_json(dir / "score_scale.json", self.model_keys)
        else:
            weights.save_model(
                self.model, dir, self.rt.dtype, self.base, tensors, tok=self.tok, **self.model_keys
            )

    def close(self):
        """Says how the run ended, and closes the log and the process group."""
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
