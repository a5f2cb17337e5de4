"""Rules by primitive family; importing this package registers them all."""
