"""``casemate demo sms``: a text classifier on a pretrained encoder, with differential privacy.

``command`` starts it and tells the story, ``messages`` is the data, ``party`` the two parties.
``model.py.txt`` is the scientist's own PyTorch file.
"""
