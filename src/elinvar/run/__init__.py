"""From a plan to arrays and back: request rows and the runner."""
