"""Training runs as Gymnasium environments.

Importing this package registers the environments; nothing else happens here. Reach them by id:

    gymnasium.make("envs:AdaptiveTransformer-v0", context=64)
"""

import gymnasium

gymnasium.register(
    id="AdaptiveTransformer-v0",
    entry_point="envs.registration:make_environment",
    vector_entry_point="envs.registration:make_vector_environment",
)
