"""The stages of a step, one module each, in the order in which `train.py` calls them: rollout,
reward, logprobs, advantage, update. Beside them: evaluation, kl_control, nonfinite."""
