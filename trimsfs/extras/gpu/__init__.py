"""GPU copies: programs lease a model's copy in device memory by the model's path, across restarts of the server."""
