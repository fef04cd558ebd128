"""Models for other tools. The protocol is settled; the first exporter brings its registry."""
