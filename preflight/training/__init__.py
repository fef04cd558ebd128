"""What a training run needs besides the step: plan, schedules, optimizers, metrics, resuming."""
