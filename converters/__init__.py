"""From public checkpoints to device bundles."""
