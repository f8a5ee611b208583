"""The method below `augdistill_core`: students, experts, the differentiable unroll, phi models. Needs torch alone."""
