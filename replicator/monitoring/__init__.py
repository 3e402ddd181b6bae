"""What Prometheus and Grafana need to watch a node, made from its configuration."""
