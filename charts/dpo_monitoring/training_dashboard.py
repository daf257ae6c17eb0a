"""The dashboard *DPO training*: whether a run learns, and how fast it is. Choose several runs to compare them."""

from __future__ import annotations

from dpo_monitoring.panels import Annotation, Dashboard, Panel, Query, Row, Variable, clusters
from dpo_monitoring.queries import ATTEMPT, JOB, gpu, of_fleet, of_run, run, run_rate

WHO = "{{dpojob}} #{{attempt}}"
CHOSEN = ', dpojob=~"$dpojob"'
_BY_JOB = f"max by ({', '.join(JOB)})"


def _both(name: str) -> tuple[Query, ...]:
    """Training and validation in one panel."""
    return (
        Query(run(f"dpo_train_{name}"), f"{WHO} train"),
        Query(run(f"dpo_val_{name}"), f"{WHO} val"),
    )


def _newest(name: str, legend: str = "{{dpojob}}") -> Query:
    """Return the newest value of a series for each job, from any attempt."""
    return Query(f"{_BY_JOB} ({of_run(name)})", legend)


_STEPS = f"{_BY_JOB} ({{}})"

NOW = Row(
    "Now",
    (
        Panel(
            "Progress",
            "Share of the planned optimizer steps that are done.",
            "percentunit",
            (
                Query(
                    f"{_STEPS.format(of_run('dpo_train_steps_total'))} / "
                    f"{_STEPS.format(of_run('dpo_train_planned_steps'))}",
                    "{{dpojob}}",
                ),
            ),
            form="stat",
            width=4,
            height=4,
            lowest=0,
            highest=1,
        ),
        Panel(
            "Validation accuracy",
            "Newest share of validation pairs whose chosen response has the higher reward. 0.5 is chance.",
            "percentunit",
            (_newest("dpo_val_reward_accuracy_ratio"),),
            form="stat",
            width=4,
            height=4,
            lowest=0,
            highest=1,
        ),
        Panel(
            "Validation margin",
            "Newest mean reward of chosen minus rejected responses of the validation pairs. It should be above 0.",
            "none",
            (_newest("dpo_val_reward_margin"),),
            form="stat",
            width=4,
            height=4,
            decimals=3,
        ),
        Panel(
            "Training loss",
            "Loss of the last step's global batch. DPO starts at ln 2 = 0.693.",
            "none",
            (_newest("dpo_train_loss"),),
            form="stat",
            width=4,
            height=4,
            decimals=4,
        ),
        Panel(
            "Time left",
            "Remaining steps times the duration of the last step, without validations and checkpoints.",
            "s",
            (
                Query(
                    f"({_STEPS.format(of_run('dpo_train_planned_steps'))} - "
                    f"{_STEPS.format(of_run('dpo_train_steps_total'))}) * "
                    f"{_STEPS.format(of_run('dpo_train_step_duration_seconds'))}",
                    "{{dpojob}}",
                ),
            ),
            form="stat",
            width=4,
            height=4,
            lowest=0,
        ),
        Panel(
            "Checkpoint age",
            "Time since the newest complete checkpoint: the work that is lost if a node fails now.",
            "s",
            (
                Query(
                    f"time() - {_STEPS.format(of_run('dpo_checkpoint_last_success_timestamp_seconds'))}", "{{dpojob}}"
                ),
            ),
            form="stat",
            width=4,
            height=4,
            lowest=0,
        ),
        Panel(
            "Runs side by side",
            "The newest values of every selected run, one row per run.",
            "none",
            (
                _newest("dpo_train_steps_total", "Step"),
                _newest("dpo_train_planned_steps", "Planned"),
                _newest("dpo_val_reward_accuracy_ratio", "Val accuracy"),
                _newest("dpo_val_reward_margin", "Val margin"),
                _newest("dpo_val_loss", "Val loss"),
                _newest("dpo_train_loss", "Train loss"),
                _newest("dpo_train_learning_rate", "Learning rate"),
                _newest("dpo_train_tokens_per_second", "Tokens/s"),
            ),
            form="table",
            width=24,
            height=6,
            units={"Val accuracy": "percentunit", "Learning rate": "sci", "Tokens/s": "short"},
        ),
    ),
)

LEARNING = Row(
    "Does it learn?",
    (
        Panel(
            "Accuracy",
            "Share of pairs whose chosen response has the higher reward: of each step's global batch (noisy) and of all"
            " validation pairs. It rises from 0.5. Training near 1 with validation far lower means overfitting.",
            "percentunit",
            _both("reward_accuracy_ratio"),
            width=12,
            lowest=0,
            highest=1,
        ),
        Panel(
            "Reward margin",
            "Mean reward of chosen minus rejected responses. It starts at 0 and rises; below 0 the pairs may be"
            " swapped.",
            "none",
            _both("reward_margin"),
            width=12,
        ),
        Panel(
            "Rewards of chosen responses",
            "Beta times how much more likely the policy finds chosen responses than the reference does. Some decline"
            " is normal in DPO; if both chosen and rejected fall steeply, the model forgets.",
            "none",
            _both("reward_chosen"),
        ),
        Panel(
            "Rewards of rejected responses",
            "The same for rejected responses. It should fall.",
            "none",
            _both("reward_rejected"),
        ),
        Panel(
            "Spread of rewards",
            "Standard deviation of the rewards of all responses. It grows as the policy moves away from the reference.",
            "none",
            _both("reward_stddev"),
        ),
        Panel(
            "Loss",
            "The loss that is minimised. DPO starts at ln 2 = 0.693, and validation should follow training down.",
            "none",
            _both("loss"),
        ),
        Panel(
            "Preference loss",
            "The preference part of the loss, before its weight.",
            "none",
            _both("preference_loss"),
        ),
        Panel(
            "SFT loss",
            "Negative log-prob of the chosen response, before its weight dpo.sftWeight; empty where that is 0. If it"
            " rises, the chosen responses become less likely.",
            "none",
            _both("sft_loss"),
        ),
        Panel(
            "Best validation",
            "Best value so far of the metric that checkpoint.monitor names; empty before the first validation, and"
            " without that field.",
            "none",
            (
                Query(
                    f"max by ({', '.join((*ATTEMPT, 'metric'))}) ({of_run('dpo_checkpoint_best_value')})",
                    f"{WHO} {{{{metric}}}}",
                ),
            ),
            width=12,
        ),
        Panel(
            "Steps since the best validation",
            "Optimizer steps since that value. If it grows for many validations, the run no longer improves: see"
            " training.earlyStopping.",
            "short",
            (Query(f"{run('dpo_train_steps_total')} - {run('dpo_checkpoint_best_step')}", WHO),),
            width=12,
            lowest=0,
        ),
    ),
)

OPTIMIZER = Row(
    "Optimizer",
    (
        Panel(
            "Learning rate",
            "Learning rate of the last step: warm-up, constant part, decay.",
            "sci",
            (Query(run("dpo_train_learning_rate"), WHO),),
            lowest=0,
        ),
        Panel(
            "Gradient norm",
            "Norm of the whole gradient before clipping. Spikes are clipped; if the norm keeps growing, use a lower"
            " learning rate.",
            "none",
            (Query(run("dpo_train_grad_norm"), WHO),),
            logarithmic=True,
        ),
        Panel(
            "Steps and epochs",
            "Optimizer steps done, earlier attempts included, and epochs. A resumed attempt starts at its checkpoint.",
            "short",
            (
                Query(run("dpo_train_steps_total"), f"{WHO} steps"),
                Query(run("dpo_train_epoch"), f"{WHO} epochs"),
            ),
            lowest=0,
        ),
    ),
)

SPEED = Row(
    "Speed",
    (
        Panel(
            "Tokens per second",
            "Tokens computed per second in the last step by all processes, without padding.",
            "short",
            (Query(run("dpo_train_tokens_per_second"), WHO),),
            lowest=0,
        ),
        Panel(
            "Step time",
            "Duration of the last optimizer step, and of the last validation.",
            "s",
            (
                Query(run("dpo_train_step_duration_seconds"), f"{WHO} step"),
                Query(run("dpo_val_step_duration_seconds"), f"{WHO} validation"),
            ),
            lowest=0,
        ),
        Panel(
            "GPU utilization (MFU)",
            "Model FLOPs utilization: what a step needs, each operation counted once, as a share of the GPUs' peak."
            " Long packs of a model that is not divided reach 40 to 50 percent.",
            "percentunit",
            (Query(run("dpo_train_mfu_ratio"), WHO),),
            lowest=0,
        ),
        Panel(
            "Slowest process",
            "Its time for its own part of a step, divided by the median. At 1.5 and more the others wait for it: the"
            " condition SlowRank names it.",
            "none",
            (Query(run("dpo_train_slowest_rank_ratio"), WHO),),
            lowest=0,
        ),
        Panel(
            "Memory of rank 0's GPU",
            "Most memory that tensors have taken, beside what was predicted when the layout was chosen. Far above the"
            " prediction, a longer pack may not fit: lower packing.maxTokens.",
            "bytes",
            (
                Query(run("dpo_train_gpu_memory_peak_bytes"), f"{WHO} peak"),
                Query(run("dpo_train_gpu_memory_predicted_bytes"), f"{WHO} predicted"),
            ),
            lowest=0,
        ),
        Panel(
            "Data and checkpoint wait",
            "Share of time that steps waited for data, and training for checkpoints. Above a few percent, the storage"
            " or the node's CPUs slow down the GPUs.",
            "percentunit",
            (
                Query(run_rate("dpo_data_wait_seconds_total"), f"{WHO} data"),
                Query(run_rate("dpo_checkpoint_wait_seconds_total"), f"{WHO} checkpoints"),
            ),
            lowest=0,
        ),
        Panel(
            "Tokens and pairs trained on",
            "Tokens that this attempt has computed and pairs that the run has been trained on, repetitions counted.",
            "short",
            (
                Query(run("dpo_train_tokens_total"), f"{WHO} tokens"),
                Query(run("dpo_train_samples_total"), f"{WHO} pairs"),
            ),
            lowest=0,
            logarithmic=True,
        ),
        Panel(
            "Since the last step",
            "Time since the last optimizer step and the last validation. It drops to 0 at each one. A long rise of"
            " both means a stall, or an export at the end.",
            "s",
            (
                Query(f"time() - {run('dpo_train_last_step_timestamp_seconds')}", f"{WHO} step"),
                Query(f"time() - {run('dpo_val_last_run_timestamp_seconds')}", f"{WHO} validation"),
            ),
            lowest=0,
        ),
        Panel(
            "Version",
            "The trainer version of each attempt.",
            "none",
            (
                Query(
                    f"max by ({', '.join((*ATTEMPT, 'version'))}) ({of_run('dpo_trainer_info')})",
                    WHO + " {{version}}",
                ),
            ),
            lowest=0,
        ),
    ),
)

DATA = Row(
    "Data and checkpoints",
    (
        Panel(
            "Age of the checkpoint",
            "Time since the attempt's newest complete checkpoint. A saw-tooth; its height is what a lost node costs.",
            "s",
            (Query(f"time() - {run('dpo_checkpoint_last_success_timestamp_seconds')}", WHO),),
            lowest=0,
        ),
        Panel(
            "Steps since the checkpoint",
            "Optimizer steps that are lost if a node fails now.",
            "short",
            (Query(f"{run('dpo_train_steps_total')} - {run('dpo_checkpoint_last_step')}", WHO),),
            lowest=0,
        ),
        Panel(
            "Pairs",
            "Usable training pairs, and records that were left out, by reason.",
            "short",
            (
                Query(run("dpo_data_pairs"), "{{dpojob}} usable"),
                Query(
                    f"max by ({', '.join((*JOB, 'reason'))}) ({of_run('dpo_data_dropped_pairs')}) > 0",
                    "{{dpojob}} left out: {{reason}}",
                ),
            ),
            lowest=0,
        ),
    ),
)


def _gpus(name: str, scale: str = "") -> tuple[Query, ...]:
    """Return mean and extremes over the GPUs of a job."""
    return tuple(
        Query(f"{how} by ({', '.join(JOB)}) ({gpu(name)}){scale}", f"{{{{dpojob}}}} {word}")
        for how, word in (("avg", "mean"), ("min", "lowest"), ("max", "highest"))
    )


GPUS = Row(
    "GPUs (where dcgm-exporter runs)",
    (
        Panel(
            "GPU utilization",
            "Share of time in which a kernel ran, over a job's GPUs. One GPU far below the others slows them all down.",
            "percentunit",
            _gpus("DCGM_FI_DEV_GPU_UTIL", " / 100"),
            lowest=0,
            highest=1,
        ),
        Panel(
            "Tensor cores",
            "Share of cycles in which the tensor cores were busy: how much of the GPUs is really used.",
            "percentunit",
            _gpus("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"),
            lowest=0,
            highest=1,
        ),
        Panel(
            "GPU memory",
            "Share of the GPU's memory in use. Near 1 the next long pack may not fit: lower packing.maxTokens.",
            "percentunit",
            (
                Query(
                    f"{_BY_JOB} ({gpu('DCGM_FI_DEV_FB_USED')} / "
                    f"({gpu('DCGM_FI_DEV_FB_USED')} + {gpu('DCGM_FI_DEV_FB_FREE')}))",
                    "{{dpojob}} highest",
                ),
            ),
            lowest=0,
            highest=1,
        ),
        Panel(
            "GPU power",
            "Power drawn by all GPUs of a job. If it drops to idle during training, the job has stalled.",
            "watt",
            (Query(f"sum by ({', '.join(JOB)}) ({gpu('DCGM_FI_DEV_POWER_USAGE')})", "{{dpojob}}"),),
            lowest=0,
        ),
        Panel(
            "GPU temperature",
            "Hot GPUs lower their clock, which makes their node slower than the others.",
            "celsius",
            _gpus("DCGM_FI_DEV_GPU_TEMP"),
            lowest=0,
        ),
        Panel(
            "GPU errors",
            "Number of the last XID error of each GPU; 0 is none. NVIDIA's list of XID errors explains the numbers.",
            "none",
            (Query(gpu("DCGM_FI_DEV_XID_ERRORS"), "{{pod}} GPU {{gpu}}"),),
            lowest=0,
        ),
    ),
    folded=True,
)

TRAINING = Dashboard(
    uid="dpo-training",
    title="DPO training",
    description="Whether a DPO run learns, and how fast it is. Choose several jobs to compare them.",
    variables=(
        clusters("dpo_trainer_info"),
        Variable(
            "namespace",
            "Namespace",
            "Namespaces of the jobs.",
            'label_values(dpo_trainer_info{cluster=~"$cluster"}, namespace)',
        ),
        Variable(
            "dpojob",
            "Job",
            "DPOJobs to show; several are compared.",
            'label_values(dpo_trainer_info{namespace=~"$namespace", cluster=~"$cluster"}, dpojob)',
        ),
    ),
    rows=(NOW, LEARNING, OPTIMIZER, SPEED, DATA, GPUS),
    annotations=(
        Annotation(
            "New attempts",
            "Marks the start of each attempt after the first.",
            f"changes({of_fleet('dpo_job_attempt', CHOSEN)}[2m]) > 0",
            "new attempt of {{dpojob}}",
            "red",
        ),
        Annotation(
            "Checkpoints",
            "Marks each complete checkpoint. Off at first, because there may be many.",
            f"changes({of_run('dpo_checkpoint_last_step')}[2m]) > 0",
            "checkpoint of {{dpojob}}",
            "blue",
            shown=False,
        ),
    ),
    start="now-6h",
)
