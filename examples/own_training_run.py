"""Meta-train on a training run of one's own, then see what the policy does.

python examples/own_training_run.py [RUN_DIR]
"""

import sys
from pathlib import Path

import numpy as np
from tracking_plant import Tracking

from metactl.config import EnvironmentConfig, PPOConfig, TrainConfig
from metactl.controllers import Learned, Static
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.rollout import PlannedRun, play
from metactl.train import train

environment = EnvironmentConfig(id="tracking_plant:Tracking-v0", n_workers=0)
config = TrainConfig(
    environment=environment, ppo=PPOConfig(total_timesteps=16 * 40 * 12, batch_size=64)
)
policy = train(config, Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own"))
loop = ControlLoop(Tracking(16), ControlConfig())
episodes = [loop.draw_episode(99, index) for index in range(16)]  # not seen in training
for name, controller in (("default", Static()), ("policy", Learned(policy))):
    planned = [PlannedRun(arm=name, episode=e, controller=controller) for e in episodes]
    print(f"{name} {np.mean([result.final_test for result in play(loop, planned)]):.3f}")
