"""The settings of the baseline: pixels learned by MTT's recipe (notebooks 02, 03 and 05)."""

import dataclasses

from augdistill_core import Config, DistillConfig, knob


@dataclasses.dataclass(frozen=True)
class PixelsConfig(Config):
    """How pixels are learned: SGD with momentum on the pixels and on alpha (not on its logarithm), as in MTT (2022)."""

    pixel_optimizer: str = knob("SGD", "the optimizer of learned pixels: any of torch.optim")
    pixel_lr: float = knob(100.0, "step size of the pixels' optimizer (MTT: 100 to 1000)", low=0)
    pixel_momentum: float = knob(0.5, "momentum of the pixels' optimizer, if it has one", low=0, high=1)
    pixel_alpha_lr: float = knob(1e-5, "SGD's step size for alpha when pixels are learned (MTT: 1e-7 to 1e-5)", low=0)

    @property
    def pixel_config(self) -> DistillConfig:
        """The `DistillConfig` of learned pixels; all other values are the run's."""
        return self.select(
            DistillConfig,
            phi_optimizer=self.pixel_optimizer,
            phi_lr=self.pixel_lr,
            phi_momentum=self.pixel_momentum,
            alpha_mode="raw",
            alpha_optimizer="SGD",
            alpha_lr=self.pixel_alpha_lr,
            alpha_momentum=0.5,
        )
