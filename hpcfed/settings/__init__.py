"""From a configuration file to checked settings."""
