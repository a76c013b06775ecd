"""Rollouts on vLLM servers: one module per job, and `inside`, which runs in vLLM's own processes.

The servers live in an environment of their own; this package talks to them over HTTP. vLLM itself is
never imported here.
"""

VERSIONS = ("0.32",)
"""Versions of vLLM that have been tested, without their last part."""
