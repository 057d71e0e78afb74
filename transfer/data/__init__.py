"""Files on a disk or a Hub -> what they are, which label each has, and their pixels."""
