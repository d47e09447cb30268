"""A client of the Kubernetes API server: raw objects in and out, typed errors. It knows neither the operator nor its metrics."""
