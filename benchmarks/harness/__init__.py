"""What every benchmark shares: contestants in processes of their own, peers, options, reports, curves."""
