"""The building blocks of `augdistill_core`: students, experts, the differentiable unroll, phis. Needs torch only."""
