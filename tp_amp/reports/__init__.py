"""What does a person look at?

Plain numbers and how they are shown, without any knowledge of models: `measurement` and `probe`
hold them, `report` and `comparison` show them as tables and JSON, and `page` as one HTML page.
"""
