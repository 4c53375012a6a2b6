"""The radius over time: each file here is a value of `perturbation.rho_schedule` under its own name."""
