import sys

from multiprocessing_pdb.client import main

sys.exit(main())
