"""What the recipes share: data, partitions, models, options, tracking, launching, reports."""
