"""An OpenAI-compatible server: ExecuTorch's HTTP server with a worker process that runs any runtime of this package."""
