"""The stages of a step, one module each, in the order in which `train.py` calls them: rollout,
reward, logprobs, advantage, update. Other modules: evaluation, kl_control, nonfinite."""
