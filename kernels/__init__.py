"""The speed: kernels that compute what the ops of the same name define, faster.

Installed as `tinygrad_llm.kernels`. A kernel never says what an op means: it is tested against the
op. Delete this folder and everything still works, slowly.
"""
