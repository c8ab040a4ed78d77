"""Files: sections in and out, data sets, the synthetic stack."""
