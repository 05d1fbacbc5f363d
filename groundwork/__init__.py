"""What both stages of Groundwork stand on: data, backbones, colour, optimisation, checkpoints."""
