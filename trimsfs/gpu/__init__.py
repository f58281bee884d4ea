"""GPU copies on loan: programs lease a model's copy in device memory by its path, across restarts of the server."""
