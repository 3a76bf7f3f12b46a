"""Jobs of a spool, run one at a time in processes of their own."""
