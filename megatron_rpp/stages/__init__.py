"""The stages of a step, one module each, in the order in which `train.py` calls them:
rollout, reward, scoring, advantage, update, evaluation."""
