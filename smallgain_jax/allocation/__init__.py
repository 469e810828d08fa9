"""The kernel that spends budgets: a fractional knapsack, greedy or fair."""
